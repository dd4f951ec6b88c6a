"""attend, attend_means and merge: attention over kept blocks, over the means of the others, and both as one.

Everything is computed in float32 (float64 for float64 input), by query blocks: beside k and v in block order and copies
of the output, memory is that of one query block's keys and scores. A row without keys, whatever the reason, has output
0 and log-sum-exp minus infinity; NaN and infinity inside attended tokens spread as in dense attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as device_of

from rainfusion.core.arrays import to_numpy
from rainfusion.core.checks import as_flag, as_int, as_number
from rainfusion.core.errors import PlanFormatError
from rainfusion.core.ops.base import Array, Op, ValueType, expect, operand, result
from rainfusion.core.ops.means import (
    compute_dtype,
    compute_name,
    expect_lengths,
    expect_order,
    log_counts,
    valid_counts,
)

Attended = tuple[Array, Array]
_Weigh = Callable[[Array, Any], Array]
_Keys = tuple[Array, Array, "Array | None"]  # keys, values, what is added to the logits


@dataclass(frozen=True, kw_only=True)
class Attend(Op):
    """softmax(q kᵀ · scale) v over the kept blocks, in the caller's token order.

    Operands:
        q: ``[B, H, q_len, D]``; k, v: ``[B, H or fewer, kv_len, D]``.
        order, inverse: the token at every block position of the queries, and back; both or neither.
        kv_order: the same for keys and values.
        mask: bool ``[B, H, q blocks, key blocks]`` over the ordered tokens; absent for dense attention.
        lengths: int32 ``[B]``; keys at positions at or beyond it take no part.

    Attributes:
        block: tokens in a query block and in a key block.
        scale: factor on the logits.
        lengths_on_queries: queries at positions at or beyond their length give output 0.
    """

    name: ClassVar[str] = "attend"
    q: str = operand()
    k: str = operand()
    v: str = operand()
    order: str | None = operand(optional=True)
    inverse: str | None = operand(optional=True)
    kv_order: str | None = operand(optional=True)
    mask: str | None = operand(optional=True)
    lengths: str | None = operand(optional=True)
    out: str = result()
    lse: str | None = result(optional=True)
    block: tuple[int, int]
    scale: float
    lengths_on_queries: bool = False

    def __post_init__(self) -> None:
        _check_block(self.block)
        as_flag(self.lengths_on_queries, "lengths_on_queries", PlanFormatError)
        as_number(self.scale, "scale", PlanFormatError, "a number")
        expect((self.order is None) == (self.inverse is None), "attend takes order and inverse together")

    def weights(self, weights: Array, xp: Any) -> Array:
        """What multiplies the values, from the weights whose sum divides; operations derived from this one round it."""
        return weights

    def meaning(self, *operands: Array) -> Attended:
        q, k, v, order, inverse, kv_order, mask, lengths = operands
        row_lengths = lengths if self.lengths_on_queries else None
        return attend(
            q,
            k,
            v,
            (order, inverse),
            kv_order,
            mask,
            lengths,
            block=self.block,
            scale=self.scale,
            q_lengths=row_lengths,
            weigh=self.weights,
        )

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        q, k, v = types["q"], types["k"], types["v"]
        fits = len(q.shape) == len(k.shape) == 4 and k == v and q.dtype == k.dtype
        fits = fits and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3]) and q.shape[1] % k.shape[1] == 0
        expect(fits, f"attend reads q, k and v of one problem; given {q}, {k}, {v}")
        for name, length in (("order", q.shape[2]), ("inverse", q.shape[2]), ("kv_order", k.shape[2])):
            expect_order(types.get(name), length, getattr(self, name))
        blocks = (-(-q.shape[2] // self.block[0]), -(-k.shape[2] // self.block[1]))
        _expect_mask(types.get("mask"), (*q.shape[:2], *blocks), self.mask)
        expect_lengths(types.get("lengths"), q.shape[0], self.lengths)
        return _attended_types(q)

    def details(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"scale": float(self.scale)}
        return shown if self.mask is None else {"block": self.block, **shown}


@dataclass(frozen=True, kw_only=True)
class AttendMeans(Op):
    """Attention over the means of the blocks that a mask omits, each weighted by its number of tokens (ours).

    The log of the token count is added to the logit, so that a block of equal keys counts exactly as its tokens would.

    Operands:
        q, order, inverse: as in `Attend`; kb, vb: means, float32 ``[B, H or fewer, key blocks, D]``.
        mask: bool ``[B, H, q blocks, key blocks]``; blocks where it is False are attended.
        lengths: int32 ``[B]``; only tokens at positions below it are counted.

    Attributes:
        block: tokens in a query block and in a key block; kv_len: tokens of the keys.
        scale, lengths_on_queries: as in `Attend`.
    """

    name: ClassVar[str] = "attend_means"
    q: str = operand()
    kb: str = operand()
    vb: str = operand()
    mask: str = operand()
    order: str | None = operand(optional=True)
    inverse: str | None = operand(optional=True)
    lengths: str | None = operand(optional=True)
    out: str = result()
    lse: str | None = result(optional=True)
    block: tuple[int, int]
    kv_len: int
    scale: float
    lengths_on_queries: bool = False

    def __post_init__(self) -> None:
        _check_block(self.block)
        as_flag(self.lengths_on_queries, "lengths_on_queries", PlanFormatError)
        as_int(self.kv_len, "kv_len", PlanFormatError)
        as_number(self.scale, "scale", PlanFormatError, "a number")
        expect((self.order is None) == (self.inverse is None), "attend_means takes order and inverse together")

    def weights(self, weights: Array, xp: Any) -> Array:
        """What multiplies the values, from the weights whose sum divides; operations derived from this one round it."""
        return weights

    def meaning(self, *operands: Array) -> Attended:
        q, kb, vb, mask, order, inverse, lengths = operands
        row_lengths = lengths if self.lengths_on_queries else None
        return attend_means(
            q,
            kb,
            vb,
            mask,
            (order, inverse),
            lengths,
            block=self.block,
            kv_len=self.kv_len,
            scale=self.scale,
            q_lengths=row_lengths,
            weigh=self.weights,
        )

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        q, kb, vb = types["q"], types["kb"], types["vb"]
        columns = -(-self.kv_len // self.block[1])
        fits = len(q.shape) == len(kb.shape) == 4 and kb == vb and kb.shape[2] == columns
        fits = fits and (q.shape[0], q.shape[3]) == (kb.shape[0], kb.shape[3]) and q.shape[1] % kb.shape[1] == 0
        expect(fits, f"attend_means reads q and means of {columns} blocks; given {q}, {kb}, {vb}")
        for name in ("order", "inverse"):
            expect_order(types.get(name), q.shape[2], getattr(self, name))
        rows = -(-q.shape[2] // self.block[0])
        _expect_mask(types["mask"], (*q.shape[:2], rows, columns), self.mask)
        expect_lengths(types.get("lengths"), q.shape[0], self.lengths)
        return _attended_types(q)

    def details(self) -> dict[str, Any]:
        return {"block": self.block, "scale": float(self.scale)}


@dataclass(frozen=True, kw_only=True)
class Merge(Op):
    """Two attentions over disjoint keys as the one over their union, by log-sum-exp, as FlashAttention's split keys.

    Operands:
        out_a, out_b: ``[B, H, q_len, D]``; lse_a, lse_b: ``[B, H, q_len]``.
    """

    name: ClassVar[str] = "merge"
    out_a: str = operand()
    lse_a: str = operand()
    out_b: str = operand()
    lse_b: str = operand()
    out: str = result()
    lse: str | None = result(optional=True)

    def meaning(self, *operands: Array) -> Attended:
        return merge(*operands)

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        out, lse = types["out_a"], types["lse_a"]
        fits = types["out_b"] == out and types["lse_b"] == lse and lse.shape == out.shape[:-1]
        expect(fits, f"merge reads two attentions of one problem; given {', '.join(map(str, types.values()))}")
        return {"out": out, "lse": lse}


def attend(
    q: Array,
    k: Array,
    v: Array,
    order: tuple[Array | None, Array | None] = (None, None),
    kv_order: Array | None = None,
    mask: Array | None = None,
    lengths: Array | None = None,
    *,
    block: tuple[int, int],
    scale: float,
    q_lengths: Array | None = None,
    weigh: _Weigh | None = None,
) -> Attended:
    """The definition of `Attend`: ``(out, lse)`` in the compute dtype, a query block at a time.

    Args:
        order: `Attend.order` and `Attend.inverse`.
        q_lengths: lengths that also end the queries, or None.
        weigh: `Attend.weights`; None leaves them as they are.
    """
    xp = array_namespace(q, k, v)
    if mask is None:
        row_of = _dense_rows(k, v, kv_order, lengths, xp)
    else:
        row_of = _sparse_rows(k, v, kv_order, mask, block[1], xp, lengths=lengths)
    return _by_rows(q, order, row_of, block[0], scale, q_lengths, xp, weigh)


def attend_means(
    q: Array,
    kb: Array,
    vb: Array,
    mask: Array,
    order: tuple[Array | None, Array | None] = (None, None),
    lengths: Array | None = None,
    *,
    block: tuple[int, int],
    kv_len: int,
    scale: float,
    q_lengths: Array | None = None,
    weigh: _Weigh | None = None,
) -> Attended:
    """The definition of `AttendMeans`; arguments as in `attend`."""
    xp = array_namespace(q, kb, vb)
    if lengths is None:
        bias = log_counts(kv_len, block[1], kb, xp)[None, :]
    else:
        bias = xp.log(xp.astype(valid_counts(lengths, kv_len, block[1], xp), kb.dtype))
    row_of = _sparse_rows(kb, vb, None, ~mask, 1, xp, bias=bias)
    return _by_rows(q, order, row_of, block[0], scale, q_lengths, xp, weigh)


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> Attended:
    """The definition of `Merge`; rows that neither side attends give 0 and minus infinity."""
    xp = array_namespace(out_a, out_b)
    peak = xp.maximum(lse_a, lse_b)
    peak = xp.where(peak == -math.inf, xp.zeros_like(peak), peak)
    weight_a, weight_b = xp.exp(lse_a - peak), xp.exp(lse_b - peak)
    total = weight_a + weight_b
    nothing = total == 0
    safe = xp.where(nothing, xp.ones_like(total), total)
    out = out_a * (weight_a / safe)[..., None] + out_b * (weight_b / safe)[..., None]
    return out, xp.where(nothing, xp.full_like(total, -math.inf), peak + xp.log(safe))


def _by_rows(
    q: Array,
    order: tuple[Array | None, Array | None],
    row_of: Callable[[int], _Keys],
    block: int,
    scale: float,
    q_lengths: Array | None,
    xp: Any,
    weigh: _Weigh | None,
) -> Attended:
    """Attention of every query block over the keys that `row_of` gives it, back in the caller's token order."""
    q_order, inverse = order
    dtype = compute_dtype(q, xp)
    parts = []
    for i in range(-(-q.shape[2] // block)):
        tokens = slice(i * block, min((i + 1) * block, q.shape[2]))
        rows = q[:, :, tokens, :] if q_order is None else xp.take(q, q_order[tokens], axis=2)
        parts.append(_softmax_pv(xp.astype(rows, dtype, copy=False) * scale, *row_of(i), xp, weigh))
    out, lse = (xp.concat(list(part), axis=2) for part in zip(*parts, strict=True))
    if q_lengths is not None:
        padded = (xp.arange(q.shape[2], device=device_of(q)) >= q_lengths[:, None])[:, None, :]
        out = xp.where(padded[..., None], xp.zeros_like(out), out)
        lse = xp.where(padded, xp.full_like(lse, -math.inf), lse)
    if inverse is None:
        return out, lse
    return xp.take(out, inverse, axis=2), xp.take(lse, inverse, axis=2)


def _dense_rows(k: Array, v: Array, order: Array | None, lengths: Array | None, xp: Any) -> Callable[[int], _Keys]:
    dtype = compute_dtype(k, xp)
    keys, values = (xp.astype(_ordered(x, order, xp), dtype, copy=False) for x in (k, v))
    if lengths is None:
        return lambda i: (keys, values, None)
    padded = (xp.arange(k.shape[2], device=device_of(k)) >= lengths[:, None])[:, None, :, None]
    keys, values = (xp.where(padded, xp.zeros_like(x), x) for x in (keys, values))  # NaN there must not spread
    shape = (k.shape[0], 1, 1, k.shape[2])
    bias = xp.where(xp.reshape(padded, shape), xp.full(shape, -math.inf, dtype=dtype, device=device_of(k)), 0.0)
    return lambda i: (keys, values, bias)


def _sparse_rows(
    k: Array,
    v: Array,
    order: Array | None,
    mask: Array,
    block: int,
    xp: Any,
    *,
    lengths: Array | None = None,
    bias: Array | None = None,
) -> Callable[[int], _Keys]:
    """A function that gathers, for query block i, the keys, values and logit bias of each head's kept blocks.

    Args:
        lengths: keys at positions at or beyond it are left out.
        bias: added to the logits, ``[B or 1, key blocks]``; minus infinity leaves a block out.
    """
    batch, heads, _, columns = mask.shape
    length, device = k.shape[2], device_of(k)
    block = min(block, length)  # memory is that of the tokens, whatever a plan says
    folded_k, folded_v = (_fold_blocks(x, order, block, lengths, xp) for x in (k, v))
    zero_block = folded_k.shape[0] - 1
    counts = xp.sum(mask, axis=-1, dtype=xp.int32)
    fewest, most = (pick(to_numpy(counts), axis=(0, 1)) for pick in (np.min, np.max))
    kept_first = xp.argsort(xp.astype(~mask, xp.uint8), axis=-1, stable=True)
    first_block = _first_block_of_heads(batch, heads, k.shape[1], columns, device, xp)
    end = length if lengths is None else xp.clip(lengths, max=length)[:, None, None, None]
    plain = length % block == 0 and lengths is None and bias is None

    def row(i: int) -> _Keys:
        width, even = int(most[i]), fewest[i] == most[i]
        in_use = xp.arange(width, device=device) < counts[:, :, i, None]
        chosen = kept_first[:, :, i, :width]
        flat = chosen + first_block
        if not even:  # spare slots must not read a skipped block, which may hold NaN
            flat = xp.where(in_use, flat, xp.full_like(flat, zero_block))
        shape = (batch, heads, width * block, k.shape[3])
        flat = xp.reshape(flat, (-1,))
        keys, values = (xp.reshape(xp.take(x, flat, axis=0), shape) for x in (folded_k, folded_v))
        if even and plain:
            return keys, values, None
        token = chosen[..., None] * block + xp.arange(block, device=device)
        used = in_use[..., None] & (token < end)
        added = xp.zeros_like(token, dtype=keys.dtype)
        if bias is not None:
            each = xp.broadcast_to(bias[:, None, :], (batch, heads, columns))
            added = added + xp.take_along_axis(each, chosen, axis=-1)[..., None]
        logit_bias = xp.where(used, added, xp.full_like(added, -math.inf))
        return keys, values, xp.reshape(logit_bias, (batch, heads, 1, width * block))

    return row


def _fold_blocks(x: Array, order: Array | None, block: int, lengths: Array | None, xp: Any) -> Array:
    """Tokens as ``[B * heads * blocks + 1, block, D]`` in the compute dtype.

    The ragged last block of a head is padded with zeros, and so is what lies beyond a sample's length; one block of
    zeros follows at the very end.
    """
    batch, heads, length, dim = x.shape
    ordered = xp.astype(_ordered(x, order, xp), compute_dtype(x, xp), copy=False)
    if lengths is not None:
        valid = (xp.arange(length, device=device_of(x)) < lengths[:, None])[:, None, :, None]
        ordered = xp.where(valid, ordered, xp.zeros_like(ordered))
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


def _softmax_pv(q: Array, k: Array, v: Array, logit_bias: Array | None, xp: Any, weigh: _Weigh | None) -> Attended:
    """softmax(q kᵀ + bias) v and its log-sum-exp; fewer key heads than query heads are shared in groups."""
    batch, heads, rows, dim = q.shape
    if k.shape[1] != heads:
        q = xp.reshape(q, (batch, k.shape[1], heads // k.shape[1] * rows, dim))
    if k.shape[2] == 0:
        nothing_kept = xp.zeros_like(q), xp.full_like(q[..., 0], -math.inf)
        return xp.reshape(nothing_kept[0], (batch, heads, rows, dim)), xp.reshape(nothing_kept[1], (batch, heads, rows))
    logits = q @ xp.matrix_transpose(k)
    if logit_bias is not None:
        logits = xp.where(logit_bias == -math.inf, logit_bias, logits + logit_bias)  # whatever the key holds
    peak = xp.max(logits, axis=-1, keepdims=True)
    peak = xp.where(peak == -math.inf, xp.zeros_like(peak), peak)
    weights = xp.exp(logits - peak)
    total = xp.sum(weights, axis=-1, keepdims=True)
    nothing = total == 0
    safe = xp.where(nothing, xp.ones_like(total), total)
    if weigh is not None:
        weights = weigh(weights, xp)
    out = xp.where(nothing, xp.zeros_like(total), (weights @ v) / safe)
    lse = xp.where(nothing, xp.full_like(total, -math.inf), peak + xp.log(safe))
    return xp.reshape(out, (batch, heads, rows, dim)), xp.reshape(lse, (batch, heads, rows))


def _ordered(x: Array, order: Array | None, xp: Any) -> Array:
    return x if order is None else xp.take(x, order, axis=2)


def _check_block(block: Any) -> None:
    expect(isinstance(block, tuple) and len(block) == 2, f"block={block!r} is not (query block, key block)")
    for size in block:
        as_int(size, "block", PlanFormatError)


def _expect_mask(given: ValueType | None, shape: tuple[int, ...], name: str | None) -> None:
    fits = given is None or (given.shape == shape and given.dtype == "bool")
    expect(fits, f"{name} is {given}; the mask is bool {list(shape)}")


def _attended_types(q: ValueType) -> dict[str, ValueType]:
    dtype = compute_name(q.dtype)
    return {"out": ValueType(q.shape, dtype), "lse": ValueType(q.shape[:-1], dtype)}
