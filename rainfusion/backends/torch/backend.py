"""TorchBackend: any torch device, attention by gathered blocks, everything else by its semantics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from array_api_compat import is_torch_array

from rainfusion.backends import torch_graph
from rainfusion.backends.interop import as_kind_of, as_numpy, on_cpu, refuse_gradients
from rainfusion.backends.torch.attend import build_attend, build_attend_with_summary
from rainfusion.core.backend import PORTABLE, Backend, Capabilities, Device, Kernel
from rainfusion.core.ir import Plan
from rainfusion.core.lower import Executable
from rainfusion.core.mask import BlockMask
from rainfusion.core.problem import DTYPES

Array = Any

# Tokens from which gathering blocks beats torch's dense attention in half precision on CUDA, by ratios that grow
# about linearly with the length (0.23 at 8192, 0.52 at 32760 tokens on an H200, 80 % skipped).
_BREAK_EVEN = 63_000


class TorchBackend(Backend):
    """Torch tensors on any device, and NumPy arrays on the CPU."""

    name = "torch"

    def devices(self) -> Sequence[Device]:
        found = [Device("cpu", name=f"torch {torch.__version__} on the CPU")]
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None:
            found = [_accelerator(accelerator.type, i) for i in range(torch.accelerator.device_count())] + found
        return found

    def device_of(self, array: Array) -> Device | None:
        if is_torch_array(array) and array.device.type not in ("cpu", "meta"):
            return Device(array.device.type, array.device.index)
        return Device("cpu") if on_cpu(array) else None

    def capabilities(self, device: Device) -> Capabilities:
        return Capabilities(dtypes=frozenset(DTYPES) - {"float64"}) if device.type == "mps" else Capabilities()

    def preference(self, plan: Plan, device: Device) -> int:
        return PORTABLE

    def speedup(self, plan: Plan, device: Device) -> float | None:
        half = plan.problem.dtype in ("float16", "bfloat16")
        if device.type != "cuda" or not half or plan.is_dense:
            return None
        return plan.problem.q_len / _BREAK_EVEN

    def kernels(self, plan: Plan, device: Device) -> Sequence[Kernel]:
        return [
            Kernel(("attend",), build_attend),
            Kernel(("attend", "attend", "merge"), build_attend_with_summary),
        ]

    def record(self, executable: Executable, q: Array, k: Array, v: Array, mask: BlockMask | None) -> Any:
        return torch_graph.record(executable, q, k, v, mask)

    def check_inputs(self, q: Array, k: Array, v: Array) -> None:
        refuse_gradients(q, k, v)

    @contextmanager
    def running(self, device: Device) -> Iterator[None]:
        """Without autograd, and without autocast, which would compute scores in half precision (Law 2)."""
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield

    def to_native(self, array: Array) -> torch.Tensor:
        if is_torch_array(array):
            return array
        # Torch has neither read-only tensors nor negative strides.
        shareable = array if array.flags.writeable and min(array.strides, default=0) >= 0 else array.copy()
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(shareable.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(shareable)

    def from_native(self, array: torch.Tensor, like: Array, dtype: str) -> Array:
        if is_torch_array(like):
            return array.to(getattr(torch, dtype))
        return as_kind_of(as_numpy(array), like, dtype)

    def from_host(self, array: np.ndarray, device: Device, dtype: str | None = None) -> torch.Tensor:
        tensor = torch.tensor(array, device=str(device))
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))

    def to_host(self, array: Array) -> np.ndarray:
        return as_numpy(array.cpu() if is_torch_array(array) else array)

    def synchronize(self, device: Device) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(str(device))


def _accelerator(kind: str, index: int) -> Device:
    module = getattr(torch, kind)
    name = module.get_device_name(index) if hasattr(module, "get_device_name") else f"torch device {kind}"
    properties = module.get_device_properties(index) if hasattr(module, "get_device_properties") else None
    return Device(kind, index, name, getattr(properties, "total_memory", None))
