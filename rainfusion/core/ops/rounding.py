"""Formats of 8 bits, and rounding to the numbers that they represent, in array-API code: the same on every library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from rainfusion.core.ops.base import Array

_E4M3_TOP = 448.0
_E4M3_LEAST_NORMAL = 2.0**-6
_E4M3_STEPS = 8  # representable numbers from one power of two up to the next: 3 bits of mantissa


class Format(NamedTuple):
    """Numbers of 8 bits.

    Attributes:
        top: the largest one.
        rounded: an array, rounded to the nearest of them; beyond `top` to `top`, NaN stays NaN.
    """

    top: float
    rounded: Callable[[Array, Any], Array]


def to_e4m3(x: Array, xp: Any) -> Array:
    """The nearest numbers of OCP float8_e4m3fn, halves to even: 2^-9 to 448, beyond that 448; in the dtype of x.

    Exactly what a conversion to that dtype and back gives, for float32 and float64. A power of two below |x| comes from
    rounding alone (Rump's unit in the first place), since the array API has no frexp.
    """
    x = xp.clip(x, min=-_E4M3_TOP, max=_E4M3_TOP)
    eps = float(xp.finfo(x.dtype).eps)
    scaled = xp.abs(x) * (1 / eps + 1)
    power = xp.abs(scaled - scaled * (1 - eps / 2))
    step = xp.clip(power, min=_E4M3_LEAST_NORMAL) / _E4M3_STEPS
    return xp.round(x / step) * step


def to_int8(x: Array, xp: Any) -> Array:
    """The nearest whole numbers from -127 to 127, halves to even; in the dtype of x."""
    return xp.clip(xp.round(x), min=-127, max=127)


FORMATS: Mapping[str, Format] = MappingProxyType({"int8": Format(127.0, to_int8), "e4m3": Format(_E4M3_TOP, to_e4m3)})


def hadamard(x: Array, xp: Any) -> Array:
    """The last axis, a power of two long, times the Hadamard matrix over the root of its length: its own inverse.

    It spreads a channel that is far larger than the others over all of them. Sums of two numbers at a time, as the fast
    Walsh-Hadamard transform has them.
    """
    shape, length, half = x.shape, x.shape[-1], 1
    while half < length:
        pairs = xp.reshape(x, (*shape[:-1], length // (2 * half), 2, half))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = xp.reshape(xp.stack([first + second, first - second], axis=-2), shape)
        half *= 2
    return x * float(np.sqrt(1 / length))


def is_power_of_two(n: int) -> bool:
    """Whether a length has a Hadamard matrix of this kind."""
    return n > 0 and n & (n - 1) == 0
