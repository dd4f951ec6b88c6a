"""Test inputs by recipe: the same numbers on every machine, from a seed.

Normal-like numbers are made of uniform ones by adding: every step is exact or correctly rounded, so no
mathematical library influences the result. Each recipe takes a case and a generator and returns
float64 q ``[B, H, q_len, D]`` and k, v ``[B, kv heads, kv_len, D]``, not yet rounded to the case's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rainfusion.testing.cases import Case

Inputs = tuple[np.ndarray, np.ndarray, np.ndarray]
POISONED_BLOCK = 1

CLIP = files("rainfusion.testing") / "big_buck_bunny.npz"
"""Uint8 brightness ``[12, 80, 128]`` of every fourth frame of a clip, for a grid of 12x10x16 tokens of 8x8 pixels.

From Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org, licensed CC BY 3.0; scaled down. A test
makes it again from the clip.
"""

CLIP_GRID = (12, 10, 16)


def normal(case: Case, rng: np.random.Generator) -> Inputs:
    """Independent, zero mean, unit variance: the scores of blocks are small and all alike."""
    p = case.problem
    q = bell(rng, (p.batch, p.heads, p.q_len, p.head_dim))
    k, v = (bell(rng, (p.batch, p.kv_heads, p.kv_len, p.head_dim)) for _ in range(2))
    return q, k, v


def large_logits(case: Case, rng: np.random.Generator) -> Inputs:
    """Logits up to about a thousand: softmax without its maximum taken off overflows, 16-bit logits are coarse."""
    q, k, v = normal(case, rng)
    return q * 16, k * 16, v


def wide_logits(case: Case, rng: np.random.Generator) -> Inputs:
    """Logits up to about fifty, as video models have them: weights that reach 1 must not saturate."""
    q, k, v = normal(case, rng)
    return q * 3.5, k * 3.5, v


def common_part(case: Case, rng: np.random.Generator) -> Inputs:
    """Keys and values with a part that all tokens share, much larger than what tells them apart."""
    q, k, v = normal(case, rng)
    return q, k + 5 * bell(rng, k[:, :, :1].shape), v + 10 * bell(rng, v[:, :, :1].shape)


def sink_block(case: Case, rng: np.random.Generator) -> Inputs:
    """The last key block draws nearly all weight, and its values are small: what is left comes from small weights."""
    q, k, v = normal(case, rng)
    direction = np.sign(bell(rng, (case.problem.head_dim,)))
    tokens = case.block_order(side=1)[-case.layout.block[1] :]
    k[:, :, tokens] += direction
    v[:, :, tokens] /= 64
    return q + direction, k, v


def channel_outliers(case: Case, rng: np.random.Generator) -> Inputs:
    """Three channels of queries and keys ten times as large as the others."""
    q, k, v = normal(case, rng)
    for x in (q, k):
        x[..., :3] *= 10
    return q / 3, k / 3, v


def peaked(case: Case, rng: np.random.Generator) -> Inputs:
    """Every query is twice some key, so that one key takes nearly all its weight."""
    q, k, v = normal(case, rng)
    match = rng.integers(0, k.shape[2], q.shape[2])
    return 2 * np.repeat(k, case.problem.group, axis=1)[:, :, match], k, v


def close_scores(case: Case, rng: np.random.Generator) -> Inputs:
    """All scores nearly equal, far apart for float32 and the same number for bfloat16."""
    q, k, v = normal(case, rng)
    return q / 4 + 3, k / 4 + 3, v


def ties(case: Case, rng: np.random.Generator) -> Inputs:
    """Small whole numbers, every other key block a copy of the one before: scores are exact and many are equal."""
    q, k, v = (np.rint(x) for x in normal(case, rng))
    tokens = case.block_order(side=1)
    block = case.layout.block[1]
    for start in range(block, k.shape[2] - block + 1, 2 * block):
        k[:, :, tokens[start : start + block]] = k[:, :, tokens[start - block : start]]
    return q, k, v


def poisoned_block(case: Case, rng: np.random.Generator) -> Inputs:
    """NaN keys and infinite values in one key block, which the case's mask or policy skips."""
    q, k, v = normal(case, rng)
    block = case.layout.block[1]
    tokens = case.block_order(side=1)[POISONED_BLOCK * block : (POISONED_BLOCK + 1) * block]
    k[:, :, tokens], v[:, :, tokens] = np.nan, np.inf
    return q, k, v


def nan_query(case: Case, rng: np.random.Generator) -> Inputs:
    """One query token is NaN; its output is, and no other."""
    q, k, v = normal(case, rng)
    q[:, :, q.shape[2] // 2] = np.nan
    return q, k, v


def minus_infinity(case: Case, rng: np.random.Generator) -> Inputs:
    """One channel of one key is minus infinity: a query attends to it not at all, or to a logit of infinity, NaN."""
    q, k, v = normal(case, rng)
    k[:, :, k.shape[2] // 2, 0] = -np.inf
    return q, k, v


def infinite_values(case: Case, rng: np.random.Generator) -> Inputs:
    """One value holds both infinities; so do the outputs that attend to it, each in its channel, and no other."""
    q, k, v = normal(case, rng)
    v[:, :, v.shape[2] // 2, :2] = np.inf, -np.inf
    return q, k, v


def clip(case: Case, rng: np.random.Generator) -> Inputs:
    """Patches of a real clip as queries and keys of one unit norm, the first head diffuse, the last peaked.

    A head turns its patches, and noise on them, by a random rotation that q and k share; text tokens are random.
    Whole numbers are exact in any order of summation, and quotients and roots correctly rounded, so the numbers
    are the same on every machine.
    """
    p = case.problem
    shape = (p.batch, p.heads, p.kv_len, p.head_dim)
    tokens = np.broadcast_to(_clip_tokens(case, rng), shape)
    noise = (np.rint(bell(rng, shape) * 4) for _ in range(2))
    hadamard, signs = _hadamard(p.head_dim), rng.integers(0, 2, (2, p.heads, 1, p.head_dim)) * 2.0 - 1
    sharpness = np.sqrt(np.geomspace(4, 16, p.heads).round() * np.sqrt(p.head_dim))[:, None, None]
    q, k = (_unit(((tokens + n) * signs[0]) @ hadamard) * sharpness for n in noise)
    return q, k, (tokens * signs[1]) @ hadamard / 512


def _clip_tokens(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers ``[tokens, head_dim]``: the brightness of a patch against the mean patch; text at its end."""
    with CLIP.open("rb") as file:
        frames = np.load(file, allow_pickle=False)["frames"]
    layout, dim = case.layout, case.problem.head_dim
    assert layout.grid is not None
    count, height, width = layout.grid
    side = frames.shape[1] // height
    tiles = frames.reshape(count, height, side, width, side).swapaxes(2, 3).reshape(-1, side * side).astype(np.float64)
    patches = np.pad(tiles - np.rint(tiles.sum(axis=0) / len(tiles)), ((0, 0), (0, dim - side * side)))
    text = np.rint(bell(rng, (layout.text, dim)) * 32)
    return np.concatenate([patches, text])


def _hadamard(size: int) -> np.ndarray:
    """The Hadamard matrix of that size, a power of two: entries ±1, rows orthogonal."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _unit(x: np.ndarray) -> np.ndarray:
    length = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    return np.asarray(x / np.maximum(length, 1.0))


_ORDINARY = (normal, large_logits, peaked, close_scores, ties, clip)
_HARD_IN_8_BITS = (wide_logits, common_part, sink_block, channel_outliers)
_NOT_FINITE = (poisoned_block, nan_query, minus_infinity, infinite_values)
RECIPES: dict[str, Callable[[Case, np.random.Generator], Inputs]] = {
    f.__name__: f for f in (*_ORDINARY, *_HARD_IN_8_BITS, *_NOT_FINITE)
}


NOT_FINITE = frozenset(f.__name__ for f in _NOT_FINITE)


def bell(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Four uniform numbers added, moved and scaled to mean 0 and variance 1; within ±3.5."""
    total = rng.random(shape)
    for _ in range(3):
        total += rng.random(shape)
    return (total - 2.0) * 1.75
