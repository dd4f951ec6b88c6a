"""TorchNpuBackend: torch tensors on Ascend NPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from array_api_compat import is_torch_array

from rainfusion.backends.interop import as_numpy, refuse_gradients
from rainfusion.backends.torch_npu import block_means, detection, ladder
from rainfusion.backends.torch_npu.rung import Wanted
from rainfusion.backends.torch_npu.whole_plan import WholePlan
from rainfusion.core.backend import Backend, Capabilities, Device, Kernel, Segment
from rainfusion.core.ir import Plan

Array = Any


class TorchNpuBackend(Backend):
    """The whole plan as one kernel: mask chain by the semantics, attention by the best operator that is there."""

    name = "torch_npu"

    def devices(self) -> Sequence[Device]:
        return detection.devices()

    def device_of(self, array: Array) -> Device | None:
        if is_torch_array(array) and array.device.type == "npu":
            return Device("npu", array.device.index)
        return None

    def capabilities(self, device: Device) -> Capabilities:
        # Alike on A2, A3 and 950. Head dims and blocks depend on each other and on what is installed: `objections`.
        return Capabilities(dtypes=frozenset({"float16", "bfloat16"}))

    def objections(self, plan: Plan, device: Device) -> Sequence[str]:
        claims = super().objections(plan, device)
        if claims or not _attends(plan):
            return claims
        return [*ladder.refusals(Wanted.by(plan, detection.chip())), *block_means.objections(plan)]

    def kernels(self, plan: Plan, device: Device) -> Sequence[Kernel]:
        every = tuple(op.name for op in plan.ops if op.args)
        return [Kernel(every, _build)] if _attends(plan) else []

    def check_inputs(self, q: Array, k: Array, v: Array) -> None:
        refuse_gradients(q, k, v)

    @contextmanager
    def running(self, device: Device) -> Iterator[None]:
        """On that device, without autograd, and without autocast and shortened float32 products: scores are float32."""
        npu = detection.torch_npu().npu
        matmul = npu.matmul
        with npu.device(device.index), torch.no_grad(), torch.autocast("npu", enabled=False):
            if not matmul.allow_hf32:
                yield
                return
            matmul.allow_hf32 = False
            try:
                yield
            finally:
                matmul.allow_hf32 = True

    def from_native(self, array: torch.Tensor, like: Array, dtype: str) -> torch.Tensor:
        return array.to(getattr(torch, dtype))

    def from_host(self, array: np.ndarray, device: Device, dtype: str | None = None) -> torch.Tensor:
        tensor = torch.tensor(array)
        return (tensor if dtype is None else tensor.to(getattr(torch, dtype))).to(str(device))

    def to_host(self, array: Array) -> np.ndarray:
        return as_numpy(array.cpu())

    def synchronize(self, device: Device) -> None:
        detection.torch_npu().npu.synchronize(str(device))


def _attends(plan: Plan) -> bool:
    return any(op.name == "attend" for op in plan.ops)


def _build(segment: Segment, plan: Plan, device: Device) -> Callable[..., tuple[torch.Tensor, ...]]:
    return WholePlan(segment, plan, torch.device(str(device)), detection.chip())
