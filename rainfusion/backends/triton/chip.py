"""What a device is, as far as kernels ask: its architecture, and how it multiplies float32."""

from __future__ import annotations

from functools import lru_cache

import torch
from triton.runtime.jit import JITFunction

from rainfusion.backends.triton.dot import dot

INTERPRETED = "interpreted"


def interprets() -> bool:
    """Whether kernels were made for Triton's interpreter, which is settled when they are first imported."""
    return not isinstance(dot, JITFunction)


@lru_cache
def architecture(device: torch.device) -> str:
    """``sm_90`` and the like on NVIDIA, ``gfx942`` and the like on AMD, ``interpreted`` where nothing is compiled."""
    if interprets() or device.type != "cuda":
        return INTERPRETED
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def precision(device: torch.device) -> str:
    """How kernels multiply: float32 as three TensorFloat-32 products where there are such, else as it is.

    Triton's interpreter multiplies the bits of bfloat16 numbers as if they were whole ones; there, ``"upcast"``.
    """
    if architecture(device) == INTERPRETED:
        return "upcast"
    return "ieee" if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0) else "tf32x3"
