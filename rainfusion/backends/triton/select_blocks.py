"""select: which key blocks each query block keeps, as ascending lists on the device, without a wait for the host.

A row is one program. Quotas and softmax mass are one search (ours): float32 scores become integers of the same order,
and bisection finds the smallest score before which less than a budget has been spent. A quota spends one a block, the
mass the block's softmax weight. Of the blocks with exactly that score the first ones are taken, as many as the budget
allows. A row keeps the union of both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion.core.layout import BlockedAxis
from rainfusion.core.ops import Select

MEANS_A_STEP = 128  # attention takes the means of omitted blocks so many at a time


@dataclass(frozen=True)
class BlockLists:
    """Kept key blocks of every query block, query blocks numbered as in ``[batch, heads, q blocks]``.

    Attributes:
        counts: int32 ``[rows]``, or ``[1]`` where all rows are alike. A row may keep nothing.
        indices: int32 ``[rows, key blocks]``, or ``[1, key blocks]``: ascending, the first `counts` are valid and the
            others undefined. Blocks without a valid token under `lengths` are not listed.
        mask: bool ``[batch, heads, q blocks, key blocks]``, where something reads it.
        bias: float32 ``[rows, key blocks in whole steps]``, where means stand for omitted blocks: what is added to
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
class Extras:
    """What else is written with the lists."""

    mask: bool = False
    bias: bool = False


def select_blocks(score: Tensor, quotas: Tensor, lengths: Tensor | None, op: Select, extras: Extras) -> BlockLists:
    """The kept blocks as `op` defines them.

    Args:
        score: float32 ``[B, H, rows, key blocks]`` contiguous, of all query blocks or of the unprotected ones.
        quotas: int32 ``[H or 1, unprotected rows]`` contiguous.
        lengths: int32 ``[B]``, or None.
    """
    batch, heads, score_rows, blocks = score.shape
    q, kv = op.q, op.kv
    lists = _empty((batch, heads, q.blocks, blocks), score.device, extras)
    width = _width(blocks, extras)
    _select_row[(batch * heads * q.blocks,)](
        score,
        quotas,
        lengths,
        lists.counts,
        lists.indices,
        lists.mask,
        lists.bias,
        0.0 if op.mass is None else op.mass,
        *_log_tokens(kv),
        kv.length,
        heads,
        q.blocks,
        q.free_blocks,
        score_rows,
        q.free_blocks if quotas.shape[0] > 1 else 0,
        kv.free_blocks,
        blocks,
        BLOCK=kv.block,
        MASS=op.mass is not None,
        OVER_ALL=op.over == "all",
        WIDTH=width,
        num_warps=_warps(width),
        enable_fp_fusion=True,
    )
    return lists


def list_blocks(mask: Tensor, lengths: Tensor | None, kv: BlockedAxis, extras: Extras) -> BlockLists:
    """The lists of a given mask, bool ``[B, H, q blocks, key blocks]`` of any strides, with that mask itself."""
    mask = mask.contiguous()
    batch, heads, rows, blocks = mask.shape
    lists = _empty((batch, heads, rows, blocks), mask.device, Extras(bias=extras.bias))
    width = _width(blocks, extras)
    _list_row[(batch * heads * rows,)](
        mask,
        lengths,
        lists.counts,
        lists.indices,
        lists.bias,
        *_log_tokens(kv),
        kv.length,
        heads * rows,
        blocks,
        BLOCK=kv.block,
        WIDTH=width,
        num_warps=_warps(width),
        enable_fp_fusion=True,
    )
    return BlockLists(lists.counts, lists.indices, mask, lists.bias)


def every_block(blocks: int, device: torch.device) -> BlockLists:
    """One list for all rows, that of all key blocks."""
    counts, indices = [blocks], [range(blocks)]  # copied, so that they are there for every stream
    return BlockLists(*(torch.tensor(x, dtype=torch.int32, device=device) for x in (counts, indices)))


def heavy_first(counts: np.ndarray, batch: int, heads: int, device: torch.device) -> Tensor:
    """The order in which query blocks are started, rows that keep many blocks first, so that none is left for the end.

    Rows of a first frame keep every key block, several times what others keep; started last, they would run alone.
    Rows of about the same length stay together head by head, so that programs running at once share a head's keys.

    Args:
        counts: int ``[heads or 1, q blocks]``, the kept blocks of a row.

    Returns:
        int32 ``[batch * heads * q blocks]``, numbered as in ``[batch, heads, q blocks]``.
    """
    weight = np.log2(np.maximum(counts, 1)).astype(np.int64)
    every = np.broadcast_to(weight, (batch, heads, weight.shape[-1])).reshape(-1)
    return torch.tensor(np.argsort(-every, kind="stable"), dtype=torch.int32, device=device)


def heavy_first_on_device(counts: Tensor) -> Tensor:
    """The same from counts that only the device knows, int32 ``[rows]``; nothing waits for the host."""
    weight = torch.log2(counts.clamp(min=1).float()).to(torch.uint8)
    return torch.sort(weight, descending=True, stable=True)[1].to(torch.int32)


def _empty(shape: tuple[int, int, int, int], device: torch.device, extras: Extras) -> BlockLists:
    rows, blocks = math.prod(shape[:3]), shape[3]
    steps = triton.cdiv(blocks, MEANS_A_STEP)
    return BlockLists(
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty((rows, blocks), dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.bool, device=device) if extras.mask else None,
        torch.empty((rows, steps * MEANS_A_STEP), dtype=torch.float32, device=device) if extras.bias else None,
    )


def _width(blocks: int, extras: Extras) -> int:
    return max(int(triton.next_power_of_2(blocks)), MEANS_A_STEP if extras.bias else 1)


def _warps(width: int) -> int:
    return min(max(width // 1024, 1), 16)


def _log_tokens(kv: BlockedAxis) -> tuple[float, float]:
    """The log of a block's tokens, and of the last block's."""
    return math.log(kv.block), math.log(int(kv.counts[-1]))


@triton.jit
def _select_row(
    score,
    quotas,
    lengths,
    counts,
    indices,
    mask,
    bias,
    mass,
    log_tokens,
    log_last,
    kv_len,
    heads,
    rows,
    free_rows,
    score_rows,
    quota_stride,
    free_blocks,
    blocks,
    BLOCK: tl.constexpr,
    MASS: tl.constexpr,
    OVER_ALL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    bh, row = line // rows, line % rows
    column = tl.arange(0, WIDTH)
    there = column < blocks
    log_weight, valid = _tokens_of(column, lengths, bh // heads, log_tokens, log_last, kv_len, blocks, BLOCK)
    kept = there
    if row < free_rows:
        free = column < free_blocks
        value = tl.load(score + (bh * score_rows + row) * blocks + column, mask=there, other=float("-inf"))
        value = tl.where((value == value) & valid, value, float("-inf"))  # NaN and padding are chosen last
        rank = _ordered(value)
        quota = tl.load(quotas + bh % heads * quota_stride + row).to(tl.float32)
        candidate = free
        if OVER_ALL:
            candidate = there
        best = _spend(rank, candidate.to(tl.float32), candidate, quota)
        if MASS:
            weight = _softmax_weights(value + log_weight, there)
            protected = tl.sum(tl.where(free, 0.0, weight), axis=0)
            best = best | _spend(rank, tl.where(free, weight, 0.0), free, mass * tl.sum(weight, axis=0) - protected)
        kept = there & (best | (column >= free_blocks))
    _write(kept, valid, column, there, log_weight, line, counts, indices, mask, bias, blocks)


@triton.jit
def _list_row(
    mask,
    lengths,
    counts,
    indices,
    bias,
    log_tokens,
    log_last,
    kv_len,
    rows_a_sample,
    blocks,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < blocks
    sample = line // rows_a_sample
    log_weight, valid = _tokens_of(column, lengths, sample, log_tokens, log_last, kv_len, blocks, BLOCK)
    kept = tl.load(mask + line * blocks + column, mask=there, other=0) != 0
    _write(kept & there, valid, column, there, log_weight, line, counts, indices, None, bias, blocks)


@triton.jit
def _tokens_of(column, lengths, sample, log_tokens, log_last, kv_len, blocks, BLOCK: tl.constexpr):
    """The log of every block's valid tokens, and which blocks have any."""
    valid = column < blocks
    log = tl.where(column == blocks - 1, log_last, log_tokens)
    if lengths is not None:
        tokens = tl.minimum(tl.load(lengths + sample).to(tl.int32), kv_len) - column * BLOCK
        valid = tokens > 0
        log = tl.log(tl.maximum(tl.minimum(tokens, BLOCK), 1).to(tl.float32))
        log = tl.where(valid, log, float("-inf"))
    return log, valid


@triton.jit
def _write(kept, valid, column, there, log_weight, line, counts, indices, mask, bias, blocks):
    """A row of the lists: its count, its kept columns one after the other, its row of the mask and of the bias."""
    listed = kept & valid
    place = tl.cumsum(listed.to(tl.int32), axis=0)
    tl.store(indices + line * blocks + place - 1, column, mask=listed)
    tl.store(counts + line, tl.sum(listed.to(tl.int32), axis=0))
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
    """Weights of a row's blocks, as `Select` defines them: an infinite logit takes all the mass."""
    largest = 3.4028234663852886e38
    logit = tl.where(there, tl.minimum(logit, largest), float("-inf"))
    peak = tl.max(logit, axis=0)
    return tl.exp(logit - tl.where(peak == float("-inf"), 0.0, peak))
