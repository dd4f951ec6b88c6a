"""OpenVinoBackend: NumPy arrays and torch CPU tensors, on every device that OpenVINO finds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from rainfusion.backends.host_arrays import as_kind_of, as_numpy, check_tensors, numpy_dtype, on_cpu, outside_transforms
from rainfusion.backends.openvino.attend import ATTENTION
from rainfusion.backends.openvino.mask_chain import MASK_CHAIN
from rainfusion.backends.openvino.runtime import found_devices, home
from rainfusion.backends.openvino.tensors import BFLOAT16
from rainfusion.core.backend import PORTABLE, VENDOR, Backend, Capabilities, Device, Kernel
from rainfusion.core.plan import Plan

Array = Any

# Tokens from which this backend was ahead of the portable torch one on two cores (docs/openvino.md): on AMD's CPUs, for
# which torch's library is not made, any plan; on others sparse ones, in dtypes that the CPU multiplies as they are.
_AHEAD_ON_AMD, _AHEAD_FROM = 1024, 8192


class OpenVinoBackend(Backend):
    """The whole plan in OpenVINO: block means a few blocks a request, attention a few rows of the mask a request.

    Every OpenVINO device reads host memory, so host tensors live on whichever of them is `home`.
    """

    name = "openvino"

    def devices(self) -> Sequence[Device]:
        return sorted(found_devices(), key=lambda device: device != home())

    def device_of(self, array: Array) -> Device | None:
        return home() if on_cpu(array) else None

    def capabilities(self, device: Device) -> Capabilities:
        # No OpenVINO device computes in float64; GPUs and NPUs have no bfloat16.
        on_device = {"cpu": {"float32", "float16", "bfloat16"}, "gpu": {"float32", "float16"}}
        return Capabilities(dtypes=frozenset(on_device.get(device.type, {"float16"})))

    def kernels(self, plan: Plan, device: Device) -> Sequence[Kernel]:
        return [MASK_CHAIN, ATTENTION]

    def preference(self, plan: Plan, device: Device) -> int:
        return VENDOR if device.type != "cpu" or _is_ahead(plan, device) else PORTABLE - 1

    def check_inputs(self, *tensors: Array) -> None:
        check_tensors(*tensors)

    def to_native(self, array: Array) -> np.ndarray:
        """The same memory as NumPy; bfloat16 stays bfloat16 (ml_dtypes), so nothing is converted."""
        if not is_torch_array(array):
            given: np.ndarray = array
            return given
        with outside_transforms():
            tensor = array.detach().resolve_neg()
            if str(tensor.dtype) == "torch.bfloat16":
                tensor = tensor.view(sys.modules["torch"].uint16)
                words: np.ndarray = tensor.numpy()
                return words.view(BFLOAT16)
            plain: np.ndarray = tensor.numpy()
            return plain

    def from_native(self, array: np.ndarray, like: Array, dtype: str) -> Array:
        if is_torch_array(like) and array.dtype == BFLOAT16:
            torch = sys.modules["torch"]
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).to(getattr(torch, dtype))
        return as_kind_of(array, like, dtype)

    def from_host(self, array: np.ndarray, device: Device, dtype: str | None = None) -> np.ndarray:
        return array if dtype is None else array.astype(numpy_dtype(dtype))

    def to_host(self, array: Array) -> np.ndarray:
        return as_numpy(array)


def _is_ahead(plan: Plan, device: Device) -> bool:
    tokens = min(plan.problem.q_len, plan.problem.kv_len)
    if device.name.startswith("AMD"):
        return tokens >= _AHEAD_ON_AMD
    return tokens >= _AHEAD_FROM and not plan.is_dense and plan.problem.dtype != "float16"
