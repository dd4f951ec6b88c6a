"""TritonBackend: CUDA and ROCm devices through Triton's kernels; with ``TRITON_INTERPRET=1`` the CPU, for testing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from rainfusion.backends.torch_arrays import TorchArrays
from rainfusion.backends.triton import cost, hardware
from rainfusion.backends.triton.lowering import UNDERSTOOD, UNDERSTOOD_IN_8_BITS, CapturedTensors, build
from rainfusion.core.backend import ORACLE, TUNED, Capabilities, Device, Kernel
from rainfusion.core.errors import BackendUnavailableError
from rainfusion.core.locks import ProcessLock
from rainfusion.core.plan import Plan

Array = Any


class TritonBackend(TorchArrays):
    """Torch tensors on CUDA devices, in float16, bfloat16 and float32.

    Attributes:
        captured: the constants that CUDA graphs read, kept until ``captured.clear()``.
    """

    name = "triton"
    device_type = "cuda"

    def __init__(self) -> None:
        self.captured = CapturedTensors()

    def devices(self) -> Sequence[Device]:
        if torch.cuda.is_available():
            return [_cuda(i) for i in range(torch.cuda.device_count())]
        if hardware.interprets():
            return [Device("cpu", name="Triton's interpreter on the CPU", stand_in="Triton's interpreter")]
        raise BackendUnavailableError(
            "torch finds no CUDA device", "a torch built for CUDA or ROCm, or TRITON_INTERPRET=1 to try it on a CPU"
        )

    def device_of(self, array: Array) -> Device | None:
        if isinstance(array, torch.Tensor) and array.device.type == "cpu" and hardware.interprets():
            return Device("cpu")
        return super().device_of(array)

    def capabilities(self, device: Device) -> Capabilities:
        return Capabilities(dtypes=frozenset({"float16", "bfloat16", "float32"}))

    def preference(self, plan: Plan, device: Device) -> int:
        return ORACLE - 1 if hardware.interprets() else TUNED  # never choose the interpreter automatically

    def speedup(self, plan: Plan, device: Device) -> float | None:
        return cost.speedup(plan, hardware.architecture(torch.device(str(device))))

    def kernels(self, plan: Plan, device: Device) -> Sequence[Kernel]:
        lowered = partial(build, captured=self.captured)
        kernels = [Kernel(UNDERSTOOD, lowered)]
        if self._is_hopper(device):
            kernels.append(Kernel(UNDERSTOOD_IN_8_BITS, lowered))
        return kernels

    @staticmethod
    def _is_hopper(device: Device) -> bool:
        return hardware.architecture(torch.device(str(device))) == "sm_90"

    @contextmanager
    def running(self, device: Device) -> Iterator[None]:
        """As in `TorchArrays`, and with kernels launched on the tensors' device."""
        place = torch.cuda.device(device.index) if device.type == "cuda" else nullcontext()
        mode = _interpreting() if hardware.interprets() else nullcontext()
        with super().running(device), place, mode:
            yield


def _cuda(index: int) -> Device:
    seen = torch.cuda.get_device_properties(index)
    return Device("cuda", index, seen.name, seen.total_memory)


_one_at_a_time = ProcessLock()


@contextmanager
def _interpreting() -> Iterator[None]:
    """Triton's interpreter keeps its position in a global, and NumPy warns of the NaN it meets."""
    with _one_at_a_time, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
