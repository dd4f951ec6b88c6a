"""How much of dense attention a block mask keeps, and how far the sparse output is from the dense one.

Computed a query block at a time, in any library that array-api-compat knows, where the tensors live; no
matrix of tokens by tokens is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from rainfusion.core.arrays import to_numpy
from rainfusion.core.layout import BlockedAxis, Grid, TokenLayout
from rainfusion.core.ops import block_mean, block_score

Array = Any


@dataclass(frozen=True)
class Recall:
    """Share of the dense attention's mass that as many blocks keep, chosen in four ways; float64 ``[heads]``.

    Attributes:
        plan: the plan's own mask.
        raster: the same rule on blocks of the raster order.
        random: blocks drawn at random, in the plan's order.
        oracle: the blocks that hold most of the mass, in the plan's order: the most there is to keep.

    All keep the same protected rows and columns, and as many blocks in every other row.
    """

    plan: np.ndarray
    raster: np.ndarray
    random: np.ndarray
    oracle: np.ndarray


def attention_recall(
    q: Array, k: Array, layout: TokenLayout, mask: np.ndarray, scale: float, seed: int = 0
) -> tuple[Recall, np.ndarray]:
    """The recall of a mask beside that of its rivals, and the block mass of dense attention.

    Args:
        q, k: ``[batch, heads, tokens, head_dim]``, one head count, tokens in the caller's order.
        layout: of the plan that made the mask.
        mask: bool ``[batch, heads, q blocks, key blocks]`` on the host.
        scale: factor on the logits.
        seed: of the random blocks.

    Returns:
        The recall, and `block_mass` in the plan's order.
    """
    sides = layout.axis(q.shape[2], 0), layout.axis(k.shape[2], 1)
    counts = sides[0].counts
    mass = block_mass(q, k, layout, scale)
    noise = np.random.default_rng(seed).random(mask.shape)
    by_raster = most_of(block_scores(q, k, raster(layout), scale), mask, sides)
    raster_mass = block_mass(q, k, raster(layout), scale)
    found = Recall(
        plan=recall(mass, mask, counts),
        raster=recall(raster_mass, by_raster, counts),
        random=recall(mass, most_of(noise, mask, sides), counts),
        oracle=recall(mass, most_of(mass, mask, sides), counts),
    )
    return found, mass


def raster(layout: TokenLayout) -> TokenLayout:
    """The same blocks over the tokens of every grid in raster order, with the same tokens protected.

    A window one token high and wider than the grid folds nothing, so nothing but the order differs.
    """
    volume = lcm(*layout.block)
    parts = (
        replace(part, window=(1, 1, volume * (part.width // volume + 1))) if isinstance(part, Grid) else part
        for part in layout.parts
    )
    return TokenLayout(parts=tuple(parts), block=layout.block) if layout.grids else layout


def block_mass(q: Array, k: Array, layout: TokenLayout, scale: float) -> np.ndarray:
    """Dense attention summed over blocks: float64 ``[batch, heads, q blocks, key blocks]`` on the host.

    Entry (i, j) is the share of the mass of query block i that falls on key block j; rows sum to 1.
    """
    xp = array_namespace(q, k)
    rows, columns = layout.axis(q.shape[2], 0), layout.axis(k.shape[2], 1)
    q = xp.astype(_ordered(q, rows, layout), xp.float32) * scale
    keys = xp.matrix_transpose(xp.astype(_ordered(k, columns, layout), xp.float32))
    mass = np.empty((*q.shape[:2], rows.blocks, columns.blocks))
    for i in range(rows.blocks):
        logits = q[:, :, i * rows.block : (i + 1) * rows.block, :] @ keys
        weights = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
        sums = _block_sums(weights, columns, xp)
        shares = sums / xp.sum(sums, axis=-1, keepdims=True)
        mass[:, :, i] = to_numpy(xp.mean(shares, axis=2))
    return mass


def block_scores(q: Array, k: Array, layout: TokenLayout, scale: float) -> np.ndarray:
    """The scores between block means by which the method chooses, on the host; shaped as `block_mass`."""
    means = (
        block_mean(_ordered(x, layout.axis(x.shape[2], side), layout), block=layout.block[side])
        for side, x in enumerate((q, k))
    )
    return to_numpy(block_score(*means, scale=scale))


def most_of(score: np.ndarray, mask: np.ndarray, sides: tuple[BlockedAxis, BlockedAxis]) -> np.ndarray:
    """A mask that keeps as many unprotected blocks a row as `mask` does, those with the highest score."""
    q, kv = sides
    free = (..., slice(q.free_blocks), slice(kv.free_blocks))
    best_first = np.argsort(-score[free], axis=-1, kind="stable")
    rank = np.argsort(best_first, axis=-1, kind="stable")
    kept = np.ones_like(mask)
    kept[free] = rank < mask[free].sum(axis=-1, keepdims=True)
    return kept


def recall(mass: np.ndarray, mask: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Share of the mass that a mask keeps, ``[heads]``, averaged over the batch.

    Args:
        mass: from `block_mass`.
        mask: bool, of the same shape.
        counts: tokens in each query block.
    """
    return np.asarray(((mass * mask).sum(axis=-1) @ counts / counts.sum()).mean(axis=0))


def relative_l1(out: np.ndarray, dense: np.ndarray) -> float:
    """``Σ|out - dense| / Σ|dense|``."""
    return float(np.abs(out - dense).sum() / np.abs(dense).sum())


def cosine(out: np.ndarray, dense: np.ndarray) -> float:
    """The cosine between two outputs, each taken as one vector."""
    a, b = out.ravel().astype(np.float64), dense.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def token_error(out: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Relative L1 error of every token over heads and channels, ``[tokens]``, averaged over the batch.

    Args:
        out, dense: ``[batch, heads, tokens, head_dim]``.
    """
    return np.asarray((np.abs(out - dense).sum(axis=(1, 3)) / np.abs(dense).sum(axis=(1, 3))).mean(axis=0))


def _ordered(x: Array, side: BlockedAxis, layout: TokenLayout) -> Array:
    """The tokens of x in the block order."""
    return layout.to_blocks(x) if side.ordered else x


def _block_sums(x: Array, side: BlockedAxis, xp: Any) -> Array:
    """The last axis summed block by block, the ragged last block as it is."""
    whole = side.length // side.block * side.block
    sums = xp.sum(xp.reshape(x[..., :whole], (*x.shape[:-1], whole // side.block, side.block)), axis=-1)
    return sums if whole == side.length else xp.concat([sums, xp.sum(x[..., whole:], axis=-1, keepdims=True)], axis=-1)
