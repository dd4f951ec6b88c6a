"""attend_quantised and attend_means_quantised: attention whose softmax weights are rounded to 8 bits, too.

They read what `quantise` made of q, k and v. Kernels that know `Attend` alone do not take them; passes treat them
alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from array_api_compat import array_namespace

from rainfusion.core.ops.attend import Attend, Attended, AttendMeans
from rainfusion.core.ops.base import Array, ValueType, operand
from rainfusion.core.ops.means import compute_name
from rainfusion.core.ops.quantise import expect_channels
from rainfusion.core.ops.rounding import to_e4m3

_RANGE = 256.0  # the largest weight is 1, and e4m3 reaches 448: scaled up, small weights keep their bits longer


@dataclass(frozen=True, kw_only=True)
class AttendQuantised(Attend):
    """`Attend` in 8 bits: ``c + sum_j e4m3(w_j) (v_j - c) / sum_j w_j``, where ``w_j = exp(logit_j - row maximum)``.

    The weights are rounded times 256. Their sum, and with it the log-sum-exp, is that of the weights before rounding.
    The error of a rounded weight then counts by how far a value is from the centre c.

    Operands:
        q to lengths: as in `Attend`; centre: c of the values, ``[B, H of v, D]``; absent: 0.
    """

    name: ClassVar[str] = "attend_quantised"
    centre: str | None = operand(optional=True)

    def weights(self, weights: Array, xp: Any) -> Array:
        return _rounded(weights, xp)

    def meaning(self, *operands: Array) -> Attended:
        return _around_centre(super().meaning, operands)

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        inferred = super().infer(types)
        expect_channels(types.get("centre"), _channels(types["v"]), self.centre)
        return inferred


@dataclass(frozen=True, kw_only=True)
class AttendMeansQuantised(AttendMeans):
    """`AttendMeans` in 8 bits, as `AttendQuantised` says.

    Operands:
        q to lengths: as in `AttendMeans`; centre: that of the values, ``[B, H of vb, D]``; absent: 0.
    """

    name: ClassVar[str] = "attend_means_quantised"
    centre: str | None = operand(optional=True)

    def weights(self, weights: Array, xp: Any) -> Array:
        return _rounded(weights, xp)

    def meaning(self, *operands: Array) -> Attended:
        return _around_centre(super().meaning, operands)

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        inferred = super().infer(types)
        expect_channels(types.get("centre"), _channels(types["vb"]), self.centre)
        return inferred


def _rounded(weights: Array, xp: Any) -> Array:
    return to_e4m3(weights * _RANGE, xp) / _RANGE


def _around_centre(attend: Callable[..., Attended], operands: Sequence[Array | None]) -> Attended:
    """Attention over the values less their centre, which every row that attends to anything then gets back."""
    q, k, v, *others, centre = operands
    if centre is None:
        return attend(q, k, v, *others)
    assert v is not None
    xp = array_namespace(v, centre)
    out, lse = attend(q, k, v - centre[:, :, None, :], *others)
    of_heads = xp.repeat(centre, out.shape[1] // centre.shape[1], axis=1)[:, :, None, :]
    return xp.where(lse[..., None] == -math.inf, out, out + of_heads), lse


def _channels(values: ValueType) -> ValueType:
    batch, heads, _, dim = values.shape
    return ValueType((batch, heads, dim), compute_name(values.dtype))
