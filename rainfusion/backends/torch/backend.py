"""TorchBackend: any torch device, attention by gathered blocks, everything else by its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rainfusion.backends.host_arrays import on_cpu
from rainfusion.backends.torch.lowering import KERNEL
from rainfusion.backends.torch_arrays import TorchArrays
from rainfusion.core.backend import PORTABLE, Capabilities, Device, Kernel
from rainfusion.core.ops import AttendQuantised
from rainfusion.core.plan import Plan
from rainfusion.core.problem import DTYPES

Array = Any

# Tokens from which gathering blocks beats torch's dense attention in half precision on CUDA, by ratios that grow
# about linearly with the length (0.23 at 8192, 0.52 at 32760 tokens on an H200, 80 % skipped).
_BREAK_EVEN = 63_000


class TorchBackend(TorchArrays):
    """Torch tensors on any device, and NumPy arrays on the CPU."""

    name = "torch"

    def devices(self) -> Sequence[Device]:
        found = [Device("cpu", name=f"torch {torch.__version__} on the CPU")]
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None:
            found = [_accelerator(accelerator.type, i) for i in range(torch.accelerator.device_count())] + found
        return found

    def device_of(self, array: Array) -> Device | None:
        if isinstance(array, torch.Tensor) and array.device.type not in ("cpu", "meta"):
            return Device(array.device.type, array.device.index)
        return Device("cpu") if on_cpu(array) else None

    def capabilities(self, device: Device) -> Capabilities:
        return Capabilities(dtypes=frozenset(DTYPES) - {"float64"}) if device.type == "mps" else Capabilities()

    def preference(self, plan: Plan, device: Device) -> int:
        return PORTABLE

    def speedup(self, plan: Plan, device: Device) -> float | None:
        half = plan.problem.dtype in ("float16", "bfloat16")
        if device.type != "cuda" or not half or plan.is_dense or plan.find(AttendQuantised) is not None:
            return None
        return plan.problem.q_len / _BREAK_EVEN

    def kernels(self, plan: Plan, device: Device) -> Sequence[Kernel]:
        return [KERNEL]


def _accelerator(kind: str, index: int) -> Device:
    module = getattr(torch, kind)
    name = module.get_device_name(index) if hasattr(module, "get_device_name") else f"torch device {kind}"
    properties = module.get_device_properties(index) if hasattr(module, "get_device_properties") else None
    return Device(kind, index, name, getattr(properties, "total_memory", None))
