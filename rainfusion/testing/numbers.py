"""Numbers: rounding to a dtype, how far two arrays are apart, and sketches of arrays that are not sent.

A sketch is `SIZE` sums of an array's elements under random signs, the same signs everywhere. For two arrays the squares
of the differences of these sums have the squared length of the difference as their mean (Alon, Matias and Szegedy,
1996). So they estimate the root mean square difference over every element, typically within an eighth.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

# Half the distance from 1 to the next number: the largest relative error of one rounding.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SIZE = 32


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 array nearest to `x` whose values the dtype of that name can hold, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return x.astype(dtype).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    kept = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), np.nan, kept.view(np.float32)).astype(np.float64)


def worst_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference; infinite where shapes, NaN or infinities do not match."""
    if got.shape != expected.shape or not np.array_equal(np.isnan(got), np.isnan(expected)):
        return math.inf
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - expected)
    same = (got == expected) | np.isnan(expected)
    return float(np.max(np.where(same, 0.0, difference), initial=0.0))


def typical_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square difference where `expected` is finite; infinite where `got` is not, or shapes differ."""
    if got.shape != expected.shape:
        return math.inf
    finite = np.isfinite(expected)
    difference = (got - np.where(finite, expected, got))[finite]
    mean = float(np.mean(difference * difference)) if difference.size else 0.0
    return math.sqrt(mean) if math.isfinite(mean) else math.inf


def largest(x: np.ndarray) -> float:
    """Largest finite absolute value, 0 where there is none."""
    return float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)))


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
