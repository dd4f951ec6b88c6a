"""What each operation means, once, for every array library that array-api-compat knows.

The reference backend is this file on NumPy; a backend that lowers only some operations gets the rest
from here. Tensors are ``[batch, heads, tokens, channels]``; everything is computed in float32 (float64
for float64 input). Orders are index vectors over tokens, or None for "as they stand".

NaN policy: a NaN score counts as minus infinity when blocks are chosen, so such a block is taken last;
NaN and infinity inside attended tokens spread exactly as they do in dense attention.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as device_of

from rainfusion.core.errors import PolicyError
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.mask import to_numpy
from rainfusion.core.policy import Policy, TopK, TopP

Array = Any


def block_mean(x: Array, order: Array | None, *, block: int) -> Array:
    """Mean of every block of tokens (RainFusion2.0, block means): ``[B, H, blocks, D]``.

    A ragged last block is the mean of the tokens it has.
    """
    xp = array_namespace(x)
    batch, heads, length, dim = x.shape
    ordered = x if order is None else xp.take(x, order, axis=2)
    whole = length // block * block
    dtype = _compute_dtype(x, xp)
    folded = xp.reshape(ordered[:, :, :whole, :], (batch, heads, whole // block, block, dim))
    means = xp.sum(folded, axis=3, dtype=dtype) / block
    if whole == length:
        return means
    tail = xp.sum(ordered[:, :, whole:, :], axis=2, keepdims=True, dtype=dtype) / (length - whole)
    return xp.concat([means, tail], axis=2)


def block_score(qb: Array, kb: Array, *, scale: float) -> Array:
    """Logits between block means, ``[B, H, q blocks, key blocks]``: softmax is monotone, so ranking needs none."""
    xp = array_namespace(qb, kb)
    batch, heads, rows, dim = qb.shape
    kv_heads, columns = kb.shape[1], kb.shape[2]
    grouped = xp.reshape(qb, (batch, kv_heads, heads // kv_heads * rows, dim))
    scores = (grouped @ xp.matrix_transpose(kb)) * scale
    return xp.reshape(scores, (batch, heads, rows, columns))


def select(score: Array, *, policy: Policy, q: BlockedAxis, kv: BlockedAxis, constant: Array | None = None) -> Array:
    """The blocks to attend, bool like `score`: the policy's choice among unprotected blocks, all protected ones.

    Args:
        constant: `selection_constant` on the device of `score`, for callers who copy it there once; None copies
            it now, for which an accelerator waits.
    """
    xp = array_namespace(score)
    score = xp.where(xp.isnan(score), xp.full_like(score, -math.inf), score)
    free = score[..., : q.free_blocks, :]
    if constant is None:
        constant = xp.asarray(selection_constant(policy, q, kv), device=device_of(score))
    if isinstance(policy, TopP):
        kept = _top_p(free, policy, kv, constant, xp)
    else:
        kept = _top_k(free[..., : kv.free_blocks], constant, xp)
    protected_columns = xp.ones_like(free[..., kv.free_blocks :], dtype=xp.bool)
    protected_rows = xp.ones_like(score[..., q.free_blocks :, :], dtype=xp.bool)
    return xp.concat([xp.concat([kept, protected_columns], axis=-1), protected_rows], axis=-2)


def selection_constant(policy: Policy, q: BlockedAxis, kv: BlockedAxis) -> np.ndarray:
    """What `select` reads beside the scores, int64.

    The blocks that each unprotected row takes, ``[free q blocks]``, for `TopK`; the tokens in every key block for
    `TopP`.

    Raises:
        PolicyError: a policy that selects nothing by score.
    """
    match policy:
        case TopK():
            return policy.row_quotas(q, kv)
        case TopP():
            return kv.counts
        case _:
            raise PolicyError(f"{policy} selects nothing by score")


def _top_k(score: Array, quotas: Array, xp: Any) -> Array:
    """Exactly quotas[i] columns of row i, the highest first, ties to the lower index (Law 2).

    What beats the quota-th best score is in; what equals it fills the places left, from the lowest index.
    """
    if score.shape[-1] == 0:
        return xp.astype(score, xp.bool)
    quota = quotas[:, None]
    place = xp.broadcast_to(xp.clip(quota - 1, min=0), (*score.shape[:-1], 1))
    threshold = xp.take_along_axis(xp.sort(score, axis=-1, descending=True), place, axis=-1)
    better, equal = score > threshold, score == threshold
    left = quota - xp.sum(better, axis=-1, keepdims=True, dtype=xp.int32)
    return better | (equal & (xp.cumulative_sum(equal, axis=-1, dtype=xp.int32) <= left))


def _top_p(score: Array, policy: TopP, kv: BlockedAxis, counts: Array, xp: Any) -> Array:
    """Per row the smallest set of unprotected columns that, with the protected ones, reaches the mass."""
    logits = score + xp.log(xp.astype(counts, score.dtype))
    logits = xp.clip(logits, max=xp.finfo(logits.dtype).max)  # an infinite score takes all the mass
    peak = xp.max(logits, axis=-1, keepdims=True)
    weights = xp.exp(logits - xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak)))
    total = xp.sum(weights, axis=-1, keepdims=True)
    free, protected = weights[..., : kv.free_blocks], weights[..., kv.free_blocks :]
    best_first = xp.argsort(score[..., : kv.free_blocks], axis=-1, descending=True, stable=True)
    sorted_weights = xp.take_along_axis(free, best_first, axis=-1)
    before = xp.cumulative_sum(sorted_weights, axis=-1) - sorted_weights
    before = before + xp.sum(protected, axis=-1, keepdims=True)
    place = xp.arange(kv.free_blocks, device=device_of(score))
    kept = (before < policy.mass * total) | (place < policy.least(kv))
    return xp.take_along_axis(kept, xp.argsort(best_first, axis=-1, stable=True), axis=-1)


def attend(
    q: Array,
    k: Array,
    v: Array,
    q_order: Array | None,
    kv_order: Array | None,
    mask: Array | None,
    *,
    block: tuple[int, int],
    scale: float,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """Attention over the kept blocks, a query block at a time, never the whole score matrix.

    Args:
        q: ``[B, H, q_len, D]``; k, v: ``[B, H or fewer, kv_len, D]``.
        mask: bool ``[B, H, q blocks, key blocks]`` over the ordered tokens; None attends to all.
        bias: added to the logits, one value a key block.

    Returns:
        ``(out, lse)`` in the compute dtype, in the caller's token order: ``[B, H, q_len, D]`` and
        ``[B, H, q_len]`` (natural log). A row that keeps nothing has output 0 and lse minus infinity.
    """
    xp = array_namespace(q, k, v)
    dtype = _compute_dtype(q, xp)
    blocks = -(-q.shape[2] // block[0])
    row_of = _dense_rows(k, v, xp) if mask is None else _sparse_rows(k, v, kv_order, mask, bias, block[1], xp)
    outs, lses = [], []
    for i in range(blocks):
        tokens = slice(i * block[0], min((i + 1) * block[0], q.shape[2]))
        rows = q[:, :, tokens, :] if q_order is None else xp.take(q, q_order[tokens], axis=2)
        keys, values, logit_bias = row_of(i)
        out, lse = _softmax_pv(xp.astype(rows, dtype, copy=False) * scale, keys, values, logit_bias, xp)
        outs.append(out)
        lses.append(lse)
    out, lse = xp.concat(outs, axis=2), xp.concat(lses, axis=2)
    if q_order is None:
        return out, lse
    inverse = xp.argsort(q_order)
    return xp.take(out, inverse, axis=2), xp.take(lse, inverse, axis=2)


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Two attentions over disjoint keys as the one over their union, by log-sum-exp."""
    xp = array_namespace(out_a, out_b)
    peak = xp.maximum(lse_a, lse_b)
    peak = xp.where(peak == -math.inf, xp.zeros_like(peak), peak)
    weight_a, weight_b = xp.exp(lse_a - peak), xp.exp(lse_b - peak)
    total = weight_a + weight_b
    nothing = total == 0  # neither side kept a key for this row
    safe = xp.where(nothing, xp.ones_like(total), total)
    out = out_a * (weight_a / safe)[..., None] + out_b * (weight_b / safe)[..., None]
    return out, xp.where(nothing, xp.full_like(total, -math.inf), peak + xp.log(safe))


def _dense_rows(k: Array, v: Array, xp: Any) -> Any:
    dtype = _compute_dtype(k, xp)
    keys, values = xp.astype(k, dtype, copy=False), xp.astype(v, dtype, copy=False)
    return lambda i: (keys, values, None)


def _sparse_rows(k: Array, v: Array, order: Array | None, mask: Array, bias: Array | None, block: int, xp: Any) -> Any:
    """A function that gathers, for query block i, the keys, values and logit bias of each head's kept blocks."""
    batch, heads, _, columns = mask.shape
    length, device = k.shape[2], device_of(k)
    folded_k, folded_v = (_fold_blocks(x, order, block, xp) for x in (k, v))
    zero_block = folded_k.shape[0] - 1
    counts = xp.sum(mask, axis=-1, dtype=xp.int32)
    fewest, most = (pick(to_numpy(counts), axis=(0, 1)) for pick in (np.min, np.max))
    kept_first = xp.argsort(xp.astype(~mask, xp.uint8), axis=-1, stable=True)
    first_block = _first_block_of_heads(batch, heads, k.shape[1], columns, device, xp)
    ragged = length % block != 0

    def row(i: int) -> tuple[Array, Array, Array | None]:
        width, even = int(most[i]), fewest[i] == most[i]
        in_use = xp.arange(width, device=device) < counts[:, :, i, None]
        chosen = kept_first[:, :, i, :width]
        flat = chosen + first_block
        if not even:  # spare slots must not read a skipped block, which may hold NaN
            flat = xp.where(in_use, flat, xp.full_like(flat, zero_block))
        shape = (batch, heads, width * block, k.shape[3])
        flat = xp.reshape(flat, (-1,))
        keys, values = (xp.reshape(xp.take(x, flat, axis=0), shape) for x in (folded_k, folded_v))
        if even and not ragged and bias is None:
            return keys, values, None
        token = chosen[..., None] * block + xp.arange(block, device=device)
        used = in_use[..., None] & (token < length)
        added = xp.zeros_like(token, dtype=keys.dtype)
        if bias is not None:
            added = added + xp.reshape(xp.take(bias, xp.reshape(chosen, (-1,)), axis=0), chosen.shape)[..., None]
        logit_bias = xp.where(used, added, xp.full_like(added, -math.inf))
        return keys, values, xp.reshape(logit_bias, (batch, heads, 1, width * block))

    return row


def _fold_blocks(x: Array, order: Array | None, block: int, xp: Any) -> Array:
    """Tokens as ``[B * heads * blocks + 1, block, D]`` in the compute dtype.

    The ragged last block of a head is padded with zeros; one block of zeros follows at the very end.
    """
    batch, heads, length, dim = x.shape
    ordered = x if order is None else xp.take(x, order, axis=2)
    ordered = xp.astype(ordered, _compute_dtype(x, xp), copy=False)
    missing = -length % block
    if missing:
        padding = xp.zeros((batch, heads, missing, dim), dtype=ordered.dtype, device=device_of(x))
        ordered = xp.concat([ordered, padding], axis=2)
    folded = xp.reshape(ordered, (batch * heads * ((length + missing) // block), block, dim))
    return xp.concat([folded, xp.zeros((1, block, dim), dtype=folded.dtype, device=device_of(x))], axis=0)


def _first_block_of_heads(batch: int, heads: int, kv_heads: int, columns: int, device: Any, xp: Any) -> Array:
    """Row of the folded keys at which the blocks of query head h start, ``[B, H, 1]`` (grouped-query attention)."""
    head = xp.arange(heads, device=device) // (heads // kv_heads)
    sample = xp.arange(batch, device=device)[:, None]
    return ((sample * kv_heads + head) * columns)[..., None]


def _softmax_pv(q: Array, k: Array, v: Array, logit_bias: Array | None, xp: Any) -> tuple[Array, Array]:
    """softmax(q kᵀ + bias) v and its log-sum-exp; fewer key heads than query heads are shared in groups."""
    batch, heads, rows, dim = q.shape
    if k.shape[1] != heads:
        q = xp.reshape(q, (batch, k.shape[1], heads // k.shape[1] * rows, dim))
    if k.shape[2] == 0:
        return xp.zeros_like(q), xp.full_like(q[..., 0], -math.inf)
    logits = q @ xp.matrix_transpose(k)
    if logit_bias is not None:
        logits = logits + logit_bias
    peak = xp.max(logits, axis=-1, keepdims=True)
    peak = xp.where(peak == -math.inf, xp.zeros_like(peak), peak)
    weights = xp.exp(logits - peak)
    total = xp.sum(weights, axis=-1, keepdims=True)
    nothing = total == 0
    safe = xp.where(nothing, xp.ones_like(total), total)
    out = xp.where(nothing, xp.zeros_like(total), (weights @ v) / safe)
    lse = xp.where(nothing, xp.full_like(total, -math.inf), peak + xp.log(safe))
    return xp.reshape(out, (batch, heads, rows, dim)), xp.reshape(lse, (batch, heads, rows))


def _compute_dtype(x: Array, xp: Any) -> Any:
    return xp.float64 if x.dtype == xp.float64 else xp.float32
