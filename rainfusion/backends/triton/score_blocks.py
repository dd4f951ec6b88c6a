"""block_score: float32 logits between the means of query blocks and of key blocks, and a prior on top."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rainfusion.backends.triton.hardware import dot

_TILE = 64


def score_blocks(
    qb: Tensor, kb: Tensor, scale: float, rows: int, precision: str, prior: Tensor | None = None
) -> Tensor:
    """Scores of the first `rows` query blocks: ``qb kbᵀ · scale + prior``.

    Args:
        qb: float32 ``[B, H, q blocks, D]`` contiguous; kb: float32 ``[B, H or fewer, key blocks, D]`` contiguous.
        precision: a name from `hardware.precision`.
        prior: float32 ``[q blocks, key blocks]`` or ``[H or 1, q blocks, key blocks]``, contiguous.

    Returns:
        float32 ``[B, H, rows, key blocks]``.
    """
    batch, heads, q_blocks, dim = qb.shape
    kv_heads, columns = kb.shape[1], kb.shape[2]
    scores = torch.empty((batch, heads, rows, columns), dtype=torch.float32, device=qb.device)
    grid = (batch * heads * triton.cdiv(rows, _TILE) * triton.cdiv(columns, _TILE),)
    _score[grid](
        qb,
        kb,
        prior,
        scores,
        scale,
        rows,
        q_blocks,
        columns,
        heads,
        heads // kv_heads,
        DIM=dim,
        TILE=_TILE,
        STEP=min(max(triton.next_power_of_2(dim), 16), 64),
        PRECISION=precision,
        PRIOR_HEADS=prior is not None and prior.dim() == 3 and prior.shape[0] > 1,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return scores


@triton.jit
def _score(
    qb,
    kb,
    prior,
    scores,
    scale,
    rows,
    q_blocks,
    columns,
    heads,
    group,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    PRIOR_HEADS: tl.constexpr,
):
    across, down = tl.cdiv(columns, TILE), tl.cdiv(rows, TILE)
    tile = tl.program_id(0)
    bh = (tile // (across * down)).to(tl.int64)
    row = tile // across % down * TILE + tl.arange(0, TILE)
    column = tile % across * TILE + tl.arange(0, TILE)
    q_rows = qb + (bh * q_blocks + row[:, None]) * DIM
    k_rows = kb + (bh // group * columns + column[None, :]) * DIM
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, DIM, STEP):
        d = start + tl.arange(0, STEP)
        q = tl.load(q_rows + d[None, :], mask=(row < rows)[:, None] & (d < DIM)[None, :], other=0.0)
        k = tl.load(k_rows + d[:, None], mask=(column < columns)[None, :] & (d < DIM)[:, None], other=0.0)
        total = dot(q, k, total, PRECISION)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    score = total * scale
    if prior is not None:
        of_head = prior
        if PRIOR_HEADS:
            of_head += bh % heads * q_blocks * columns
        score += tl.load(of_head + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(scores + (bh * rows + row[:, None]) * columns + column[None, :], score, mask=inside)
