"""select: which key blocks each query block keeps, as ascending lists on the device. Nothing waits for the host.

A row is one program. Both policies are one search: float32 scores become integers of the same order, and bisection
finds the least score before which less than a budget has been spent. `TopK` spends one a block, `TopP` the block's
softmax weight. Of the blocks with exactly that score the first ones are taken, as many as the budget allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion.core.layout import BlockedAxis
from rainfusion.core.policy import TopP

MEANS_A_STEP = 128  # attention takes the means of skipped blocks so many at a time


@dataclass(frozen=True)
class BlockLists:
    """Kept key blocks of every query block, query blocks numbered as in ``[batch, heads, q blocks]``.

    Attributes:
        counts: int32 ``[rows]``, or ``[1]`` where all rows are alike.
        indices: int32 ``[rows, key blocks]``, or ``[1, key blocks]``: ascending, the first `counts` are valid. A row
            that keeps nothing, which only a mask written to after it was checked can have, holds no valid index:
            kernels may read anything there, and must neither hang nor leave the tensors for it.
        mask: bool ``[batch, heads, q blocks, key blocks]``, where something returns it.
        bias: float32 ``[rows, key blocks in whole steps]``, where means stand for skipped blocks: what is added to
            their logits, the base-2 log of the tokens they stand for; minus infinity for blocks that are kept.
    """

    counts: Tensor
    indices: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None

    @property
    def strides(self) -> tuple[int, int]:
        """Steps from row to row in `counts` and in `indices`."""
        return (1, self.indices.shape[1]) if self.counts.numel() > 1 else (0, 0)


@dataclass(frozen=True)
class Wanted:
    """What else is made with the lists."""

    mask: bool = False
    bias: bool = False


def select_top_k(score: Tensor, quotas: Tensor, rows: int, kv: BlockedAxis, wanted: Wanted) -> BlockLists:
    """Exactly ``quotas[i]`` unprotected blocks for row i, the best first, ties to the lower index.

    Args:
        score: float32 ``[B, H, unprotected rows, key blocks]``.
        quotas: int32 ``[unprotected rows]``.
        rows: query blocks, protected ones counted in.
    """
    return _select(score, rows, kv, wanted, quotas=quotas)


def select_top_p(score: Tensor, policy: TopP, rows: int, kv: BlockedAxis, wanted: Wanted) -> BlockLists:
    """The fewest best unprotected blocks that, with the protected ones, hold the policy's share of a row's softmax.

    Args:
        score, rows: as in `select_top_k`.
    """
    return _select(score, rows, kv, wanted, mass=policy.mass, least=policy.least(kv))


def _select(
    score: Tensor,
    rows: int,
    kv: BlockedAxis,
    wanted: Wanted,
    *,
    quotas: Tensor | None = None,
    mass: float = 0.0,
    least: int = 0,
) -> BlockLists:
    batch, heads, free_rows, blocks = score.shape
    lists = _empty((batch, heads, rows, blocks), score.device, wanted)
    width = _width(blocks, wanted)
    _select_row[(batch * heads * rows,)](
        score,
        quotas,
        lists.counts,
        lists.indices,
        lists.mask,
        lists.bias,
        mass,
        least,
        *_log_tokens(kv),
        rows,
        free_rows,
        kv.free_blocks,
        blocks,
        WIDTH=width,
        num_warps=_warps(width),
        enable_fp_fusion=True,
    )
    return lists


def list_blocks(mask: Tensor, kv: BlockedAxis, wanted: Wanted) -> BlockLists:
    """The lists of a given mask, bool ``[B, H, q blocks, key blocks]`` of any strides."""
    mask = mask.contiguous()
    batch, heads, rows, blocks = mask.shape
    lists = _empty((batch, heads, rows, blocks), mask.device, Wanted(bias=wanted.bias))
    width = _width(blocks, wanted)
    _list_row[(batch * heads * rows,)](
        mask,
        lists.counts,
        lists.indices,
        lists.bias,
        *_log_tokens(kv),
        blocks,
        WIDTH=width,
        num_warps=_warps(width),
        enable_fp_fusion=True,
    )
    return BlockLists(lists.counts, lists.indices, mask, lists.bias)


def every_block(blocks: int, device: torch.device) -> BlockLists:
    """One list for all rows, that of all key blocks."""
    counts, indices = [blocks], [range(blocks)]  # copied, so that they are there for every stream
    return BlockLists(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (counts, indices)))


def _empty(shape: tuple[int, int, int, int], device: torch.device, wanted: Wanted) -> BlockLists:
    rows, blocks = math.prod(shape[:3]), shape[3]
    steps = triton.cdiv(blocks, MEANS_A_STEP)
    return BlockLists(
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty((rows, blocks), dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.bool, device=device) if wanted.mask else None,
        torch.empty((rows, steps * MEANS_A_STEP), dtype=torch.float32, device=device) if wanted.bias else None,
    )


def _width(blocks: int, wanted: Wanted) -> int:
    return max(int(triton.next_power_of_2(blocks)), MEANS_A_STEP if wanted.bias else 1)


def _warps(width: int) -> int:
    return min(max(width // 1024, 1), 16)


def _log_tokens(kv: BlockedAxis) -> tuple[float, float]:
    """The log of a block's tokens, and of the last block's."""
    return math.log(kv.block), math.log(int(kv.counts[-1]))


@triton.jit
def _select_row(
    score,
    quotas,
    counts,
    indices,
    mask,
    bias,
    mass,
    least,
    log_tokens,
    log_last,
    rows,
    free_rows,
    free_blocks,
    blocks,
    WIDTH: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    bh, row = line // rows, line % rows
    column = tl.arange(0, WIDTH)
    there = column < blocks
    log_weight = tl.where(column == blocks - 1, log_last, log_tokens)
    kept = there
    if row < free_rows:
        free = column < free_blocks
        value = tl.load(score + (bh * free_rows + row) * blocks + column, mask=there, other=float("-inf"))
        value = tl.where(value == value, value, float("-inf"))  # NaN is chosen last
        rank = _ordered(value)
        if quotas is not None:
            best = _spend(rank, free.to(tl.float32), free, tl.load(quotas + row).to(tl.float32))
        else:
            weight = _softmax_weights(value + log_weight, there)
            protected = tl.sum(tl.where(free, 0.0, weight), axis=0)
            best = _spend(rank, tl.where(free, weight, 0.0), free, mass * tl.sum(weight, axis=0) - protected)
            best = best | _spend(rank, free.to(tl.float32), free, least * 1.0)
        kept = there & (best | (column >= free_blocks))
    _write(kept, column, there, log_weight, line, counts, indices, mask, bias, blocks)


@triton.jit
def _list_row(mask, counts, indices, bias, log_tokens, log_last, blocks, WIDTH: tl.constexpr):
    line = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < blocks
    log_weight = tl.where(column == blocks - 1, log_last, log_tokens)
    kept = tl.load(mask + line * blocks + column, mask=there, other=0) != 0
    _write(kept & there, column, there, log_weight, line, counts, indices, None, bias, blocks)


@triton.jit
def _write(kept, column, there, log_weight, line, counts, indices, mask, bias, blocks):
    """A row of the lists: its count, its kept columns one after the other, its row of the mask and of the bias."""
    place = tl.cumsum(kept.to(tl.int32), axis=0)
    tl.store(indices + line * blocks + place - 1, column, mask=kept)
    tl.store(counts + line, tl.sum(kept.to(tl.int32), axis=0))
    if mask is not None:
        tl.store(mask + line * blocks + column, kept, mask=there)
    if bias is not None:
        width = tl.cdiv(blocks, 128) * 128
        added = tl.where(there & (kept == 0), log_weight * 1.4426950408889634, float("-inf"))
        tl.store(bias + line * width + column, added, mask=column < width)


@triton.jit
def _ordered(value):
    """float32 as uint32 of the same order, -0 equal to 0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def _spend(rank, cost, free, budget):
    """The blocks of highest rank before which less than `budget` is spent, ties to the lower index."""
    least = tl.full([], 0, tl.uint32)
    for bit in tl.static_range(31, -1, -1):
        lower_half = least + ((1 << bit) - 1)
        spent = tl.sum(tl.where(rank > lower_half, cost, 0.0), axis=0)
        least = tl.where(spent < budget, least, least + (1 << bit))
    level = free & (rank == least)
    tied = tl.where(level, cost, 0.0)
    before = tl.sum(tl.where(rank > least, cost, 0.0), axis=0) + tl.cumsum(tied, axis=0) - tied
    return (free & (rank > least)) | (level & (before < budget))


@triton.jit
def _softmax_weights(logit, there):
    """Weights of a row's blocks, as `semantics.select` defines them: an infinite logit takes all the mass."""
    largest = 3.4028234663852886e38
    logit = tl.where(there, tl.minimum(logit, largest), float("-inf"))
    peak = tl.max(logit, axis=0)
    return tl.exp(logit - tl.where(peak == float("-inf"), 0.0, peak))
