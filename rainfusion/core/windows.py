"""Windows: the boxes of neighbouring tokens that a grid is cut into, and the order this makes.

Source: RainFusion2.0 (arXiv 2512.24086), section on the 3D token permutation. The choice of the window by
compactness and the folding of the ragged remainder are ours.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from math import isqrt, lcm

import numpy as np

from rainfusion.core.errors import LayoutError

Sizes = tuple[int, int, int]

# A latent frame spans several pixel frames, so a step in time counts as more than a step in space when
# windows are ranked by compactness; 8 gives the paper's public 2x8x8 for blocks of 128.
_TIME_WEIGHT = 8

# Windows are searched among the factorisations of their volume, which takes as long as the volume is large.
_LARGEST_WINDOW = 2**20


def window_volume(block: tuple[int, int]) -> int:
    """The least number of tokens that fills whole blocks on both sides.

    Raises:
        LayoutError: it is larger than windows may be.
    """
    volume = lcm(*block)
    if volume > _LARGEST_WINDOW:
        raise LayoutError(
            f"block={block} needs windows of {volume} tokens to fill whole blocks of both sides; "
            f"choose sizes whose least common multiple is at most {_LARGEST_WINDOW}"
        )
    return volume


@lru_cache(maxsize=256)
def compact_window(volume: int, grid: Sizes) -> Sizes:
    """The most compact (t, h, w) with t*h*w = volume that fits into `grid`, or, where none fits, at all.

    Compact means least ``8 t² + h² + w²``; the wider of two equals wins.
    """
    windows = _windows(volume)
    frames, height, width = grid
    return next((w for w in windows if w[0] <= frames and w[1] <= height and w[2] <= width), windows[0])


@lru_cache(maxsize=16)
def _windows(volume: int) -> tuple[Sizes, ...]:
    """Every (t, h, w) of this volume, the most compact first."""
    small = [n for n in range(1, isqrt(volume) + 1) if volume % n == 0]
    divisors = sorted({*small, *(volume // n for n in small)})
    windows = [(t, h, volume // (t * h)) for t, h in product(divisors, divisors) if volume % (t * h) == 0]
    return tuple(sorted(windows, key=lambda w: (_TIME_WEIGHT * w[0] ** 2 + w[1] ** 2 + w[2] ** 2, w[1])))


def fold(tokens: np.ndarray, window: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Lay out a [T, H, W] box of token indices: the tokens of whole windows, and those of the ragged remainder.

    Every axis is cut into the part that whole windows cover and the rest, which makes eight boxes. The seven
    remainders follow each other as H, W, HW, T, TH, TW, THW. In a remainder the window is as thin as the rest of its
    axis, so each box is tiled exactly.
    """
    cuts = [size - size % step for size, step in zip(tokens.shape, window, strict=True)]
    boxes = []
    for ragged_t, ragged_w, ragged_h in product((False, True), repeat=3):
        ragged = (ragged_t, ragged_h, ragged_w)
        box = tokens[tuple(slice(cut, None) if r else slice(cut) for r, cut in zip(ragged, cuts, strict=True))]
        tile = tuple(n if r else w for r, n, w in zip(ragged, box.shape, window, strict=True))
        boxes.append(_tiled(box, tile) if box.size else np.empty(0, dtype=tokens.dtype))
    return boxes[0], np.concatenate(boxes[1:])


def _tiled(box: np.ndarray, tile: tuple[int, ...]) -> np.ndarray:
    """Indices of a box, tile after tile, raster order within and between: (T t) (H h) (W w) -> (T H W t h w)."""
    (big_t, t), (big_h, h), (big_w, w) = ((n // step, step) for n, step in zip(box.shape, tile, strict=True))
    return box.reshape(big_t, t, big_h, h, big_w, w).transpose(0, 2, 4, 1, 3, 5).ravel()


def times(sizes: tuple[int, ...]) -> str:
    """Sizes as people write them: ``21x45x80``."""
    return "x".join(map(str, sizes))
