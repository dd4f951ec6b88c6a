"""quantise on blocks: what attention in 8 bits reads, from q, k and v in the caller's order (the op is `Quantise`).

Two passes. `statistics` reads k and v once for what all of a head's tokens share: the mean of every channel, and the
largest distance from it. `quantise_blocks` reads a tensor through its order, a block a program, and writes it rounded;
it makes the means of the blocks on the way, of the numbers before rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128
KEY_ORDER = tuple(16 * a + 8 * b + 2 * c + e for a in range(8) for c in range(4) for b in range(2) for e in range(2))
"""The key at every place of a block of v: the order in which a thread of wgmma holds the columns of q kᵀ."""

_TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_CHUNK = tl.constexpr(1024)  # tokens a program of the statistics reads
_LEAST_SCALE = tl.constexpr(2.0**-126)  # one over a smaller one may be infinite, and infinity times 0 is NaN


@dataclass(frozen=True)
class Rounded:
    """One tensor in block order and 8 bits.

    Attributes:
        x: ``[B, H, blocks * 128, D]``, or transposed by blocks ``[B, H, blocks * D, 128]``; zeros beyond the
            last token.
        scale: float32 ``[B, H, blocks]``, or with every scale 64 times ``[B, H, blocks, 64]``; None where it was given.
        mean: float32 ``[B, H, blocks, D]``, where it was asked for.
        shift: float32 ``[B, H, blocks * 128]``, products of the tokens with a vector, where it was asked for.
    """

    x: Tensor
    scale: Tensor | None = None
    mean: Tensor | None = None
    shift: Tensor | None = None


def statistics(
    x: Tensor, order: Tensor | None, lengths: Tensor | None, *, spread: bool
) -> tuple[Tensor, Tensor | None]:
    """The mean of every channel of ``[B, H, tokens, D]`` over the valid tokens, float32 ``[B, H, D]``, and, under
    `spread`, the largest distance from it over 448, or 1 where that is 0.

    Args:
        order: int32 ``[tokens]``, position to token; read only where lengths say which positions are valid.
        lengths: int32 ``[B]``.
    """
    batch, heads, length, dim = x.shape
    chunks = -(-length // _CHUNK.value)
    parts = x.new_empty((3 if spread else 1, batch * heads, chunks, dim), dtype=torch.float32)
    centre = x.new_empty((batch, heads, dim), dtype=torch.float32)
    scale = torch.empty_like(centre) if spread else None
    width = triton.next_power_of_2(dim)
    order = None if lengths is None else order
    sizes = (heads, chunks, length, batch * heads * chunks * dim)
    settings = {"DIM": dim, "WIDTH": width, "SPREAD": spread, "num_warps": 4, "enable_fp_fusion": True}
    _chunk_statistics[(batch * heads * chunks,)](x, order, lengths, parts, *x.stride(), *sizes, **settings)
    _head_statistics[(batch * heads,)](parts, lengths, centre, scale, *sizes, **settings)
    return centre, scale


def quantise_blocks(
    x: Tensor,
    order: Tensor | None,
    lengths: Tensor | None,
    dtype: torch.dtype,
    *,
    centre: Tensor | None = None,
    channel_scale: Tensor | None = None,
    rotate: bool = False,
    repeat_scale: bool = False,
    transpose: bool = False,
    mean: bool = False,
    shift_by: Tensor | None = None,
) -> Rounded:
    """Round ``[B, H, tokens, D]`` (any strides), read in blocks of 128 tokens.

    Args:
        order, lengths: as in `fold_blocks`; tokens that are not valid are rounded to 0.
        dtype: int8 or float8_e4m3fn.
        centre: float32 ``[B, H, D]``, taken off before rounding.
        channel_scale: float32 ``[B, H, D]``; without, every block has a scale of its own.
        rotate: multiply by the Hadamard matrix of the head dim over its square root, after the centre is off.
        repeat_scale, transpose: as `Rounded` says.
        mean: also compute the mean of every block.
        shift_by: float32 ``[B, H or fewer, D]``; also compute the product of every token with it.
    """
    batch, heads, length, dim = x.shape
    blocks = -(-length // ROWS)
    shape = (batch, heads, blocks * dim, ROWS) if transpose else (batch, heads, blocks * ROWS, dim)
    scale_shape = (batch, heads, blocks, 64) if repeat_scale else (batch, heads, blocks)
    wide = partial(torch.empty, dtype=torch.float32, device=x.device)
    rounded = Rounded(
        torch.empty(shape, dtype=dtype, device=x.device),
        wide(scale_shape) if channel_scale is None else None,
        wide((batch, heads, blocks, dim)) if mean else None,
        wide((batch, heads, blocks * ROWS)) if shift_by is not None else None,
    )
    _quantise[(batch * heads * blocks,)](
        x,
        order,
        lengths,
        centre,
        channel_scale,
        shift_by,
        rounded.x,
        rounded.scale,
        rounded.mean,
        rounded.shift,
        *x.stride(),
        heads,
        1 if shift_by is None else heads // shift_by.shape[1],
        blocks,
        length,
        DIM=dim,
        TOP=_TOP[dtype],
        IS_INTEGER=dtype == torch.int8,
        REPEAT=64 if repeat_scale else 1,
        TRANSPOSE=transpose,
        ROTATE=rotate,
        SPREAD=dim**0.5,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return rounded


@triton.jit
def _chunk_statistics(
    x,
    order,
    lengths,
    parts,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    heads,
    chunks,
    length,
    part_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Sum, and under SPREAD least and largest number, of every channel over one chunk of a head's tokens."""
    ROWS: tl.constexpr = 32
    chunk_of_all = tl.program_id(0)
    bh, chunk = chunk_of_all // chunks, chunk_of_all % chunks
    source = x + (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    d = tl.arange(0, WIDTH)
    end = length
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + bh // heads).to(tl.int32), length)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    least = tl.full([ROWS, WIDTH], float("inf"), tl.float32)
    most = tl.full([ROWS, WIDTH], float("-inf"), tl.float32)
    for start in range(0, _CHUNK, ROWS):
        position = chunk * _CHUNK + start + tl.arange(0, ROWS)
        inside = tl.maximum(tl.minimum(position, end - 1), 0)  # beyond the end, its last token again
        token = inside
        if order is not None:
            token = tl.load(order + inside)
        at = token.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
        part = tl.load(source + at, mask=(d < DIM)[None, :], other=0.0).to(tl.float32)
        total += tl.where((position < end)[:, None], part, 0.0)
        if SPREAD:
            least = tl.minimum(least, part)
            most = tl.maximum(most, part)
    into = parts + chunk_of_all.to(tl.int64) * DIM + d
    tl.store(into, tl.sum(total, axis=0), mask=d < DIM)
    if SPREAD:
        tl.store(into + part_stride, tl.min(least, axis=0), mask=d < DIM)
        tl.store(into + 2 * part_stride, tl.max(most, axis=0), mask=d < DIM)


@triton.jit
def _head_statistics(
    parts,
    lengths,
    centre,
    scale,
    heads,
    chunks,
    length,
    part_stride,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Mean and scale of every channel of one head from the statistics of its chunks."""
    bh = tl.program_id(0)
    d = tl.arange(0, WIDTH)
    end = length
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + bh // heads).to(tl.int32), length)
    total = tl.zeros([WIDTH], tl.float32)
    least = tl.full([WIDTH], float("inf"), tl.float32)
    most = tl.full([WIDTH], float("-inf"), tl.float32)
    for chunk in range(chunks):
        at = parts + (bh * chunks + chunk).to(tl.int64) * DIM + d
        total += tl.load(at, mask=d < DIM, other=0.0)
        if SPREAD:
            least = tl.minimum(least, tl.load(at + part_stride, mask=d < DIM, other=0.0))
            most = tl.maximum(most, tl.load(at + 2 * part_stride, mask=d < DIM, other=0.0))
    mean = total / tl.maximum(end, 1).to(tl.float32)
    tl.store(centre + bh * DIM + d, mean, mask=d < DIM)
    if SPREAD:
        far = tl.maximum(most - mean, mean - least)
        far = tl.where(end > 0, far, 0.0)
        one = tl.maximum(far * (1.0 / 448.0), _LEAST_SCALE)
        one = tl.where(far == 0.0, 1.0, one)
        one = tl.where(mean == mean, one, mean)  # NaN spreads
        tl.store(scale + bh * DIM + d, one, mask=d < DIM)


@triton.jit
def _quantise(
    x,
    order,
    lengths,
    centre,
    channel_scale,
    shift_by,
    rounded,
    scales,
    means,
    shifts,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    heads,
    group,
    blocks,
    length,
    DIM: tl.constexpr,
    TOP: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    REPEAT: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ROTATE: tl.constexpr,
    SPREAD: tl.constexpr,
):
    block_of_all = tl.program_id(0)
    bh, block = block_of_all // blocks, block_of_all % blocks
    source = x + (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    place = tl.arange(0, 128)
    row = place
    if TRANSPOSE:  # KEY_ORDER
        row = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    d = tl.arange(0, DIM)
    end = length
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + bh // heads).to(tl.int32), length)
    position = block * 128 + row
    valid = position < end
    token = position
    if order is not None:
        token = tl.load(order + position, mask=valid, other=0)
    at = token.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
    tokens = tl.load(source + at, mask=valid[:, None], other=0.0).to(tl.float32)
    if means is not None:
        count = tl.minimum(end - block * 128, 128)
        count = tl.maximum(count, 1)  # the mean of no token is 0
        mean = tl.div_rn(tl.sum(tokens, axis=0), count.to(tl.float32))
        tl.store(means + block_of_all.to(tl.int64) * DIM + d, mean)
    if shifts is not None:
        kv_bh = bh // heads * (heads // group) + bh % heads // group
        by = tl.load(shift_by + kv_bh * DIM + d)
        tl.store(shifts + block_of_all.to(tl.int64) * 128 + place, tl.sum(tokens * by[None, :], axis=1))
    if centre is not None:
        tokens = tl.where(valid[:, None], tokens - tl.load(centre + bh * DIM + d)[None, :], 0.0)
    if ROTATE:  # the sign of an entry is the parity of the bits that its row and column, below 256, have in common
        common = d[:, None] & d[None, :]
        common ^= common >> 4
        common ^= common >> 2
        common ^= common >> 1
        matrix = (1 - 2 * (common & 1)).to(tl.float32)
        tokens = tl.dot(tokens, matrix, input_precision="tf32") * (1.0 / SPREAD)
    if channel_scale is not None:
        scale = tl.load(channel_scale + bh * DIM + d)[None, :]
        tokens = tokens * (1.0 / scale)
    else:
        # The largest as bits, where infinity and NaN are above all numbers: neither may pass for one once rounded.
        bits = tl.max(tl.max(tokens.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
        measured = tl.maximum(bits.to(tl.float32, bitcast=True) * (1.0 / TOP), _LEAST_SCALE)
        scale = tl.where(bits == 0, 1.0, tl.where(bits < 0x7F800000, measured, float("nan")))
        repeat = tl.arange(0, REPEAT)
        tl.store(scales + block_of_all.to(tl.int64) * REPEAT + repeat, tl.zeros([REPEAT], tl.float32) + scale)
        tokens = tokens * (1.0 / scale)
    if IS_INTEGER:
        tokens = tl.minimum(tl.maximum((tokens + 12582912.0) - 12582912.0, -127.0), 127.0)  # nearest, halves to even
    eight = tokens.to(rounded.dtype.element_ty)
    into = rounded + block_of_all.to(tl.int64) * (128 * DIM)
    if TRANSPOSE:
        tl.store(into + d[:, None] * 128 + place[None, :], tl.trans(eight))
    else:
        tl.store(into + place[:, None] * DIM + d[None, :], eight)
