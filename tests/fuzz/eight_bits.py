"""Attention in 8 bits as docs/precision.md has it, written a second time: with ml_dtypes' FP8 and whole logit matrices.

Its softmax is also that of attention without rounding.

Rounding is not continuous: where ``(x - c) / s`` lies next to a tie, the last bit of a mean decides which way it goes,
and nothing says which way is right. `Rounding.nudge` moves everything that is rounded a little, up or down, so that
what ties cost a problem is measured instead of guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np
from scipy.linalg import hadamard

_TOPS = {"int8": 127.0, "fp8": 448.0}
_WEIGHTS_TIMES = 256.0


@dataclass(frozen=True)
class Rounding:
    """Of one computation.

    Attributes:
        precision: of queries and keys; values and weights are FP8.
        nudge: what is rounded is first moved away from 0, by this share of itself and 1/32 of it of the largest number.
        nudge_weights: the same for softmax weights, which have the error of their logits.
    """

    precision: str
    rotate: bool
    nudge: float = 0.0
    nudge_weights: float = 0.0

    def to_grid(self, x: np.ndarray, precision: str) -> np.ndarray:
        """The nearest numbers of 8 bits, beyond the largest the largest; NaN stays NaN."""
        top = _TOPS[precision]
        moved = x * x.dtype.type(1 + self.nudge) + np.sign(x) * x.dtype.type(self.nudge / 32 * top)
        x = np.clip(moved, -top, top)
        return np.rint(x) if precision == "int8" else x.astype(ml_dtypes.float8_e4m3fn).astype(x.dtype)

    def of_weights(self, weights: np.ndarray) -> np.ndarray:
        moved = weights * weights.dtype.type(_WEIGHTS_TIMES * (1 + self.nudge_weights))
        fp8 = np.clip(moved, 0, _TOPS["fp8"]).astype(ml_dtypes.float8_e4m3fn)
        return fp8.astype(weights.dtype) / weights.dtype.type(_WEIGHTS_TIMES)


class Tokens(NamedTuple):
    """A tensor ``[batch, heads, rows, channels]`` in block order; zero where `valid` ``[batch or 1, rows]`` is not."""

    x: np.ndarray
    valid: np.ndarray

    def centre(self) -> np.ndarray:
        """The mean of every channel over the valid rows, ``[batch, heads, 1, channels]``."""
        counts = np.maximum(self.valid.sum(axis=-1), 1).astype(self.x.dtype)
        total: np.ndarray = self.x.sum(axis=2, keepdims=True)
        return total / counts[:, None, None, None]

    def less(self, centre: np.ndarray) -> np.ndarray:
        return np.where(self.valid[:, None, :, None], self.x - centre, 0).astype(self.x.dtype)


def by_blocks(rounding: Rounding, tokens: Tokens, block: int, centre: np.ndarray | float) -> np.ndarray:
    """Queries or keys: one scale for every `block` rows of a head."""
    x = tokens.less(np.asarray(centre, tokens.x.dtype))
    dim = x.shape[-1]
    turn = (hadamard(dim) / np.sqrt(dim)).astype(x.dtype) if rounding.rotate else None
    x = x if turn is None else np.where(tokens.valid[:, None, :, None], x @ turn, 0)
    starts = np.arange(0, x.shape[2], block)
    largest = np.maximum.reduceat(np.abs(x).max(axis=-1), starts, axis=2)
    scale = _scale(np.repeat(largest, block, axis=2)[:, :, : x.shape[2], None], rounding.precision)
    rounded = rounding.to_grid(x / scale, rounding.precision) * scale
    y = centre + (rounded if turn is None else rounded @ turn)
    return np.where(tokens.valid[:, None, :, None], y, 0).astype(x.dtype)


def scale_of_channels(values: Tokens, centre: np.ndarray) -> np.ndarray:
    """The scale of every channel of a head, over all its tokens."""
    return _scale(np.abs(values.less(centre)).max(axis=2, keepdims=True), "fp8")


def by_channels(rounding: Rounding, values: Tokens, centre: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Values less their centre, rounded."""
    return rounding.to_grid(values.less(centre) / scale, "fp8") * scale


def _scale(largest: np.ndarray, precision: str) -> np.ndarray:
    scale = largest / largest.dtype.type(_TOPS[precision])
    return np.where(scale == 0, 1, scale).astype(largest.dtype)


def softmax(
    logits: np.ndarray, keep: np.ndarray, values: np.ndarray, rounding: Rounding | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Masked softmax; what is not kept has no effect, even NaN; a row that keeps nothing gives 0 and -inf.

    Args:
        rounding: of the weights that multiply values; their sum is that of exact ones. None leaves them exact.
    """
    logits = np.where(keep, logits, -np.inf)
    peak = logits.max(axis=-1, keepdims=True)
    peak = np.where(np.isneginf(peak), 0, peak).astype(logits.dtype)
    weights = np.exp(logits - peak)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights if rounding is None else rounding.of_weights(weights)
    out = weights @ np.where(np.isnan(values), 0, values) / np.where(total == 0, 1, total)
    spread = keep.astype(np.float32) @ np.isnan(values).astype(np.float32) > 0
    return np.where(spread, np.nan, out), (peak + np.log(total))[..., 0]


def merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Attentions over disjoint keys as the one over all of them."""
    lse = np.stack([lse for _, lse in parts])
    peak = lse.max(axis=0)
    weights = np.exp(lse - np.where(np.isneginf(peak), 0, peak))
    total = weights.sum(axis=0)
    out = (
        sum(x * w[..., None] for (x, _), w in zip(parts, weights, strict=True))
        / np.where(total == 0, 1, total)[..., None]
    )
    return out, np.log(total) + np.where(np.isneginf(peak), 0, peak)
