"""The product of two tiles that keeps what float32 holds."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` in float32, by a name from `chip.precision`; `a` is rounded to the dtype of `b` first."""
    if PRECISION == "upcast":
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)
