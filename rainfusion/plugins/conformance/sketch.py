"""Sketches: a few numbers of an array that tell how far it is from another one that somebody else has.

Each number is the sum of the array's elements under random signs, the same signs for everybody. For two arrays the
squares of the differences of these sums have the squared length of the difference as their mean (the sketch of
Alon, Matias and Szegedy, 1996), so `SIZE` of them estimate the root mean square difference over every element,
typically within an eighth, and nobody sends the array.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

SIZE = 32


def sketch(x: np.ndarray) -> list[float]:
    """`SIZE` sums under random signs, in float64; NaN and infinities count as 0, see `pattern`."""
    signs = np.random.default_rng(0).integers(0, 2**SIZE, x.size, dtype=np.uint32)
    values = np.where(np.isfinite(x), x, 0.0).ravel()
    return [float(np.where(signs >> np.uint32(bit) & 1, values, -values).sum()) for bit in range(SIZE)]


def rms_difference(a: Sequence[float], b: Sequence[float], elements: int) -> float:
    """Estimated root mean square difference of two arrays of that many elements, from their sketches."""
    return math.dist(a, b) / math.sqrt(len(a) * elements)


def pattern(x: np.ndarray) -> str:
    """A digest of where NaN and either infinity stand."""
    marks = np.isnan(x) + 2 * np.isposinf(x) + 3 * np.isneginf(x)
    return digest(marks.astype(np.uint8))


def digest(x: np.ndarray) -> str:
    """A digest of an array's bits: equal for equal arrays. Every NaN is the same one."""
    plain = np.where(np.isnan(x), np.nan, x + 0.0) if x.dtype.kind == "f" else x  # minus zero is zero
    return hashlib.sha256(np.ascontiguousarray(plain).tobytes()).hexdigest()[:16]
