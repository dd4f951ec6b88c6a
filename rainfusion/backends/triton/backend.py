"""TritonBackend: CUDA and ROCm devices through Triton's kernels; with ``TRITON_INTERPRET=1`` the CPU, for testing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any

import numpy as np
import torch
from array_api_compat import is_torch_array

from rainfusion.backends import torch_graph
from rainfusion.backends.interop import as_numpy, refuse_gradients
from rainfusion.backends.triton import chip, cost
from rainfusion.backends.triton.lowering import RUNS, build
from rainfusion.core.backend import ORACLE, TUNED, Backend, Capabilities, Device, Kernel
from rainfusion.core.errors import BackendUnavailableError
from rainfusion.core.ir import Plan
from rainfusion.core.lower import Executable
from rainfusion.core.mask import BlockMask

Array = Any
VERIFIED_ON = ("sm_90",)


class TritonBackend(Backend):
    """Torch tensors on CUDA devices, in float16, bfloat16 and float32."""

    name = "triton"

    def devices(self) -> Sequence[Device]:
        if torch.cuda.is_available():
            return [_cuda(i) for i in range(torch.cuda.device_count())]
        if chip.interprets():
            return [Device("cpu", name="Triton's interpreter on the CPU", stand_in="Triton's interpreter")]
        raise BackendUnavailableError(
            "torch finds no CUDA device", "a torch built for CUDA or ROCm, or TRITON_INTERPRET=1 to try it on a CPU"
        )

    def device_of(self, array: Array) -> Device | None:
        if not is_torch_array(array):
            return None
        if array.device.type == "cuda":
            return Device("cuda", array.device.index)
        return Device("cpu") if array.device.type == "cpu" and chip.interprets() else None

    def capabilities(self, device: Device) -> Capabilities:
        return Capabilities(dtypes=frozenset({"float16", "bfloat16", "float32"}), architectures=VERIFIED_ON)

    def preference(self, plan: Plan, device: Device) -> int:
        return ORACLE - 1 if chip.interprets() else TUNED  # nobody wants interpreted kernels unasked

    def speedup(self, plan: Plan, device: Device) -> float | None:
        return cost.speedup(plan, chip.architecture(torch.device(str(device))))

    def kernels(self, plan: Plan, device: Device) -> Sequence[Kernel]:
        return [Kernel(covers, build) for covers in RUNS]

    def record(self, executable: Executable, q: Array, k: Array, v: Array, mask: BlockMask | None) -> Any:
        return torch_graph.record(executable, q, k, v, mask)

    def check_inputs(self, q: Array, k: Array, v: Array) -> None:
        refuse_gradients(q, k, v)

    @contextmanager
    def running(self, device: Device) -> Iterator[None]:
        """Without autograd and autocast, and with kernels launched on the tensors' device."""
        place = torch.cuda.device(device.index) if device.type == "cuda" else nullcontext()
        mode = _interpreting() if chip.interprets() else nullcontext()
        with torch.no_grad(), torch.autocast(device.type, enabled=False), place, mode:
            yield

    def to_native(self, array: torch.Tensor) -> torch.Tensor:
        return array.resolve_neg()  # kernels read what lies in memory, whatever sign a view of it has

    def from_native(self, array: torch.Tensor, like: Array, dtype: str) -> torch.Tensor:
        return array.to(getattr(torch, dtype))

    def from_host(self, array: np.ndarray, device: Device, dtype: str | None = None) -> torch.Tensor:
        tensor = torch.tensor(array, device=str(device))
        return tensor if dtype is None else tensor.to(getattr(torch, dtype))

    def to_host(self, array: Array) -> np.ndarray:
        return as_numpy(array.cpu())

    def synchronize(self, device: Device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device.index)


def _cuda(index: int) -> Device:
    seen = torch.cuda.get_device_properties(index)
    return Device("cuda", index, seen.name, seen.total_memory)


_one_at_a_time = RLock()


@contextmanager
def _interpreting() -> Iterator[None]:
    """Triton's interpreter keeps its place in a global, and NumPy warns of the NaN it meets."""
    with _one_at_a_time, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
