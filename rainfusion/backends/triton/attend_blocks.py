"""attend as one plain Triton kernel, for every device Triton compiles for.

A program holds up to 128 query rows of one head and walks their list of key blocks with a running softmax, as in
FlashAttention-2; the means of omitted blocks (AttendMeans) follow in the same softmax. The output is written to the
caller's tokens, so no pass restores their order afterwards.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from rainfusion.backends.triton.hardware import dot
from rainfusion.backends.triton.operands import LOG2_E, Attention
from rainfusion.backends.triton.tuning import AttendConfig

_LN_2 = tl.constexpr(math.log(2.0))


def attend_blocks(given: Attention, out: Tensor, lse: Tensor | None, config: AttendConfig, precision: str) -> None:
    """Write attention over the listed blocks to `out`, ``[B, H, q_len, D]``, and its log-sum-exp to `lse`.

    Args:
        lse: float32 ``[B, H, q_len]`` contiguous, or None.
        precision: a name from `hardware.precision`.
    """
    q, k, v, means = given.q, given.k, given.v, given.means
    heads, dim = q.shape[1], q.shape[3]
    q_block, kv_block = given.block
    rows, keys = config.fitting(given.block)
    parts = triton.cdiv(q_block, rows)
    _attend[(given.tiles.numel() * parts,)](
        q,
        k,
        v,
        None if means is None else means.k,
        None if means is None else means.v,
        None if means is None else given.lists.bias,
        out,
        lse,
        given.out_order,
        given.lengths,
        given.tiles,
        given.lists.counts,
        given.lists.indices,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        *given.lists.strides,
        heads,
        heads // k.shape[1],
        given.q_len,
        given.kv_len,
        given.q_blocks,
        given.kv_blocks,
        given.scale * LOG2_E,
        Q_BLOCK=q_block,
        KV_BLOCK=kv_block,
        ROWS=rows,
        KEYS=keys,
        DIM=dim,
        WIDTH=max(triton.next_power_of_2(dim), 16),
        PARTS=parts,
        FITS=kv_block % keys == 0,
        EVEN=given.kv_len % kv_block == 0 and given.lengths is None,
        LENGTHS_ON_QUERIES=given.lengths is not None and given.lengths_on_queries,
        POSITIVE=given.scale > 0,
        PRECISION=precision,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )


@triton.jit
def _attend(
    q,
    k,
    v,
    mean_k,
    mean_v,
    bias,
    out,
    lse,
    out_order,
    lengths,
    tiles,
    counts,
    indices,
    q_b,
    q_h,
    q_n,
    q_d,
    k_b,
    k_h,
    k_n,
    k_d,
    v_b,
    v_h,
    v_n,
    v_d,
    out_b,
    out_h,
    out_n,
    out_d,
    count_stride,
    index_stride,
    heads,
    group,
    q_len,
    kv_len,
    q_blocks,
    kv_blocks,
    scale,
    Q_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    FITS: tl.constexpr,
    EVEN: tl.constexpr,
    LENGTHS_ON_QUERIES: tl.constexpr,
    POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    tile = tl.load(tiles + program // PARTS).to(tl.int64)
    bh, block = tile // q_blocks, tile % q_blocks
    b, h = bh // heads, bh % heads
    g = h // group
    first = program % PARTS * ROWS
    row = first + tl.arange(0, ROWS)
    position = block * Q_BLOCK + row
    there = (row < Q_BLOCK) & (position < q_len)
    query = _tokens(q + b * q_b + h * q_h, block * Q_BLOCK + first, there, q_n, q_d, ROWS, DIM, WIDTH)
    keys, values = k + b * k_b + g * k_h, v + b * v_b + g * v_h
    listed = indices + tile * index_stride
    count = tl.load(counts + tile * count_stride)
    end = kv_len
    if lengths is not None:  # lists hold no block without a valid key, except for the one that all rows share
        end = tl.maximum(tl.minimum(tl.load(lengths + b).to(tl.int32), kv_len), 0)
        count = tl.minimum(count, tl.cdiv(end, KV_BLOCK))
    mean_blocks = kv_blocks
    if LENGTHS_ON_QUERIES:  # nothing to do where all rows are padding
        padding = block * Q_BLOCK + first >= end
        count = tl.where(padding, 0, count)
        mean_blocks = tl.where(padding, 0, kv_blocks)

    STEPS: tl.constexpr = (KV_BLOCK + KEYS - 1) // KEYS
    total = count * STEPS
    whole = 0  # steps that need not look at where the keys end: all, or all but those of the last block, or none
    if FITS:
        whole = total
        if not EVEN:
            whole = tl.maximum(total - STEPS, 0)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    for i in range(0, whole):
        at = tl.load(listed + i // STEPS).to(tl.int64) * KV_BLOCK + i % STEPS * KEYS
        key = _tokens(keys, at, None, k_n, k_d, KEYS, DIM, WIDTH)
        value = _tokens(values, at, None, v_n, v_d, KEYS, DIM, WIDTH)
        acc, mass, peak = _step(acc, mass, peak, query, key, value, None, scale, POSITIVE, PRECISION)
    for i in range(whole, total):
        of_block = i % STEPS * KEYS + tl.arange(0, KEYS)
        at = tl.load(listed + i // STEPS).to(tl.int64) * KV_BLOCK + i % STEPS * KEYS
        valid = (of_block < KV_BLOCK) & (at + tl.arange(0, KEYS) < end)
        key = _tokens(keys, at, valid, k_n, k_d, KEYS, DIM, WIDTH)
        value = _tokens(values, at, valid, v_n, v_d, KEYS, DIM, WIDTH)
        hidden = tl.where(valid, 0.0, float("-inf"))
        acc, mass, peak = _step(acc, mass, peak, query, key, value, hidden, scale, POSITIVE, PRECISION)
    if bias is not None:
        head = (b * (heads // group) + g) * kv_blocks * DIM
        weights = bias + tile * (tl.cdiv(kv_blocks, 128) * 128)
        for start in range(0, mean_blocks, KEYS):
            mean = start + tl.arange(0, KEYS)
            valid = mean < kv_blocks
            key = _tokens(mean_k + head, start, valid, DIM, 1, KEYS, DIM, WIDTH)
            value = _tokens(mean_v + head, start, valid, DIM, 1, KEYS, DIM, WIDTH)
            weight = tl.load(weights + mean, mask=valid, other=float("-inf"))
            acc, mass, peak = _step(acc, mass, peak, query, key, value, weight, scale, POSITIVE, PRECISION)

    token = position
    if out_order is not None:
        token = tl.load(out_order + position, mask=there, other=0)
    if LENGTHS_ON_QUERIES:
        mass = tl.where(position < end, mass, 0.0)
    empty = mass == 0.0
    mass = tl.where(empty, 1.0, mass)
    result = tl.where(empty[:, None], 0.0, acc / mass[:, None])
    d = tl.arange(0, WIDTH)
    into = out + b * out_b + h * out_h + token.to(tl.int64)[:, None] * out_n + d[None, :] * out_d
    tl.store(into, result.to(out.dtype.element_ty), mask=there[:, None] & (d < DIM)[None, :])
    if lse is not None:
        natural = (_finite(peak) + tl.log2(mass)) * _LN_2
        tl.store(lse + bh * q_len + token, tl.where(empty, float("-inf"), natural), mask=there)


@triton.jit
def _tokens(x, first, valid, stride_n, stride_d, COUNT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """COUNT tokens from position `first` on, ``[COUNT, WIDTH]``, zero where invalid and beyond the head dim."""
    n, d = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    at = x + first * stride_n + (n[:, None] * stride_n + d[None, :] * stride_d)
    if valid is not None:
        return tl.load(at, mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    if DIM < WIDTH:
        return tl.load(at, mask=(d < DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _step(acc, mass, peak, query, key, value, bias, scale, POSITIVE: tl.constexpr, PRECISION: tl.constexpr):
    """One more run of keys in the running softmax; logits are in base 2."""
    logit = dot(query, key.T, tl.zeros([query.shape[0], key.shape[0]], tl.float32), PRECISION)
    if POSITIVE and bias is None:  # one multiply-add a logit: the maximum is scaled, not every logit before it
        highest = tl.maximum(peak, tl.max(logit, axis=1) * scale)
        shifted = logit * scale - _finite(highest)[:, None]
    else:
        logit = logit * scale
        if bias is not None:
            logit += bias[None, :]
        highest = tl.maximum(peak, tl.max(logit, axis=1))
        shifted = logit - _finite(highest)[:, None]
    weight = tl.exp2(shifted)
    fade = tl.exp2(peak - _finite(highest))
    mass = mass * fade + tl.sum(weight, axis=1)
    acc = dot(weight, value, acc * fade[:, None], PRECISION)
    return acc, mass, highest


@triton.jit
def _finite(peak):
    """What is taken off the logits: their maximum, or 0 where all of them are minus infinity."""
    return tl.where(peak == float("-inf"), 0.0, peak)
