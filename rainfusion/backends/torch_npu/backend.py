"""TorchNpuBackend: torch tensors on Ascend NPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from rainfusion.backends.torch_arrays import TorchArrays
from rainfusion.backends.torch_npu import detection, lowering, operators
from rainfusion.backends.torch_npu.operators import Request
from rainfusion.core.backend import Capabilities, Device, Kernel
from rainfusion.core.ops import Attend, AttendQuantised
from rainfusion.core.plan import Plan

MOST_REMEMBERED = 1024  # samples; a constant of that many numbers costs nothing to remember


class TorchNpuBackend(TorchArrays):
    """Attention with its mask chain as one kernel: the chain by the definitions, attention by the best operator."""

    name = "torch_npu"
    device_type = "npu"

    def devices(self) -> Sequence[Device]:
        return detection.devices()

    def capabilities(self, device: Device) -> Capabilities:
        # Head dims and blocks depend on each other and on what is installed: `objections`.
        return Capabilities(dtypes=frozenset(detection.chip().dtypes))

    def objections(self, plan: Plan, device: Device) -> Sequence[str]:
        claims = super().objections(plan, device)
        attends = [op for op in plan.ops if isinstance(op, Attend)]
        if claims or not attends:
            return claims
        chip = detection.chip()
        if any(isinstance(op, AttendQuantised) for op in attends):
            vendor = f"MindIE-SD's for precision {' and '.join(chip.precisions)} are not lowered to yet"
            which = vendor if chip.precisions else "none is documented"
            return [f"no operator for attention in 8 bits on chip {chip.name}: {which}; backend='torch' emulates it"]
        requests = [Request.of(op, plan, chip) for op in attends]
        refused = [reason for request in requests for reason in operators.refusals(request)]
        return [*dict.fromkeys(refused), *lowering.means_objections(plan)]

    def kernels(self, plan: Plan, device: Device) -> Sequence[Kernel]:
        return [lowering.KERNEL]

    def from_host(self, array: np.ndarray, device: Device, dtype: str | None = None) -> torch.Tensor:
        """As for all torch tensors. One number a sample is remembered: operators take lengths as numbers."""
        tensor = super().from_host(array, device, dtype)
        if array.ndim == 1 and array.size <= MOST_REMEMBERED:
            tensor.given_on_host = array.copy()  # type: ignore[attr-defined]  # what `lowering.on_host` reads
        return tensor

    @contextmanager
    def running(self, device: Device) -> Iterator[None]:
        """As for all torch tensors, on that device, and without shortened float32 products: scores are float32."""
        npu = detection.torch_npu().npu
        matmul = npu.matmul
        with npu.device(device.index), super().running(device):
            if not matmul.allow_hf32:
                yield
                return
            matmul.allow_hf32 = False
            try:
                yield
            finally:
                matmul.allow_hf32 = True

    def synchronize(self, device: Device) -> None:
        detection.torch_npu().npu.synchronize(str(device))
