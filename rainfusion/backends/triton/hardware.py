"""What kernels need to know of a device: its architecture, and how it multiplies float32."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

INTERPRETED = "interpreted"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` in float32, by a name from `precision`; `a` is rounded to the dtype of `b` first."""
    if PRECISION == "upcast":
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided when they are first imported."""
    return not isinstance(dot, JITFunction)


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """``sm_90`` and the like on NVIDIA, ``gfx942`` and the like on AMD, ``interpreted`` where nothing is compiled."""
    if interprets() or device.type != "cuda":
        return INTERPRETED
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def precision(device: torch.device) -> str:
    """How kernels multiply: float32 as three TensorFloat-32 products where the device has them, else in float32.

    Triton's interpreter multiplies the bits of bfloat16 numbers as if they were integers; there, ``"upcast"``.
    """
    if architecture(device) == INTERPRETED:
        return "upcast"
    return "ieee" if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0) else "tf32x3"
