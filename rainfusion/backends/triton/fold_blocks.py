"""block_mean and the token order in one pass: tokens copied into block order, and the means of the blocks.

Every token is read once, through the order; only what the plan needs is written (the folded copy, the means in float32
for scoring and in the tensors' dtype for attending).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens a program keeps in registers at a time; a longer block is read in several steps.
_ROWS = 128
_FLOATS = 128 * 128


@dataclass(frozen=True)
class Folded:
    """One tensor in block order.

    Attributes:
        tokens: ``[B, H, blocks * block, D]`` contiguous, zero beyond the last valid token; or the tensor as given.
        mean: float32 ``[B, H, blocks, D]``, where it was asked for.
        half_mean: the same in the dtype of the tokens.
    """

    tokens: Tensor
    mean: Tensor | None = None
    half_mean: Tensor | None = None


def fold_blocks(
    x: Tensor,
    order: Tensor | None,
    block: int,
    lengths: Tensor | None = None,
    *,
    copy: bool,
    mean: bool = False,
    half_mean: bool = False,
) -> Folded:
    """Fold ``[B, H, tokens, D]`` (any strides) into blocks.

    Args:
        order: int32 ``[tokens]``, position to token; None where the tokens stand in block order.
        lengths: int32 ``[B]``, valid positions of each sample; the others are copied as zeros and are in no mean.
        copy: write the tokens in block order; otherwise `tokens` is `x` itself.
        mean, half_mean: also compute the mean of every block over the valid tokens it has, 0 where it has none.
    """
    if not (copy or mean or half_mean):
        return Folded(x)
    batch, heads, length, dim = x.shape
    blocks = -(-length // block)
    tokens = x.new_empty((batch, heads, blocks * block, dim)) if copy else x
    means = (batch, heads, blocks, dim)
    folded = Folded(
        tokens,
        x.new_empty(means, dtype=torch.float32) if mean else None,
        x.new_empty(means) if half_mean else None,
    )
    width = triton.next_power_of_2(dim)
    rows = min(triton.next_power_of_2(block), _ROWS, max(_FLOATS // width, 1))
    _fold[(batch * heads * blocks,)](
        x,
        order,
        lengths,
        tokens,
        folded.mean,
        folded.half_mean,
        *x.stride(),
        heads,
        blocks,
        length,
        BLOCK=block,
        ROWS=rows,
        DIM=dim,
        WIDTH=width,
        COPY=copy,
        num_warps=8 if rows * width > 64 * 128 else 4,
        enable_fp_fusion=True,
    )
    return folded


@triton.jit
def _fold(
    x,
    order,
    lengths,
    tokens,
    means,
    half_means,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    heads,
    blocks,
    length,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    COPY: tl.constexpr,
):
    row_of_blocks = tl.program_id(0)
    bh, block = row_of_blocks // blocks, row_of_blocks % blocks
    source = x + (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    d = tl.arange(0, WIDTH)
    into = row_of_blocks.to(tl.int64) * DIM
    end = length
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + bh // heads).to(tl.int32), length)
    total = tl.zeros([WIDTH], tl.float32)
    for start in range(0, BLOCK, ROWS):
        row = start + tl.arange(0, ROWS)
        position = block * BLOCK + row
        valid = (row < BLOCK) & (position < end)
        token = position
        if order is not None:
            token = tl.load(order + position, mask=valid, other=0)
        at = token.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
        part = tl.load(source + at, mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
        if COPY:
            folded = tokens + into * BLOCK + row[:, None] * DIM + d[None, :]
            tl.store(folded, part, mask=(row < BLOCK)[:, None] & (d < DIM)[None, :])
        if (means is not None) or (half_means is not None):
            total += tl.sum(part.to(tl.float32), axis=0)
    if (means is not None) or (half_means is not None):
        count = tl.minimum(end - block * BLOCK, BLOCK)
        if lengths is not None:
            count = tl.maximum(count, 1)  # the mean of no token is 0
        mean = tl.div_rn(total, count.to(tl.float32))
        if means is not None:
            tl.store(means + into + d, mean, mask=d < DIM)
        if half_means is not None:
            tl.store(half_means + into + d, mean.to(half_means.dtype.element_ty), mask=d < DIM)
