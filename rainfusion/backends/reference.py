"""ReferenceBackend: no kernel of its own, so every operation runs by its definition, on NumPy.

float64 inputs are computed in float64, all others in float32. Beside its inputs a call takes memory for nine tensors
of the size of q in that dtype at most, twelve where q, k and v are bfloat16 and are widened first: k and v in block
order, a query block's share of them and of the scores, and the output by rows, as a whole and in the caller's order.
The logits of more than one query block never exist at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rainfusion.backends.host_arrays import as_kind_of, as_numpy, check_tensors, has_bfloat16, host_array, on_cpu
from rainfusion.core.backend import ORACLE, Backend, Capabilities, Device
from rainfusion.core.plan import Plan
from rainfusion.core.problem import DTYPES

Array = Any
_HOST = Device("cpu", name="NumPy on the host")


class ReferenceBackend(Backend):
    """NumPy arrays and torch CPU tensors, every dtype, every shape."""

    name = "reference"

    def devices(self) -> Sequence[Device]:
        return [_HOST]

    def device_of(self, array: Array) -> Device | None:
        return _HOST if on_cpu(array) else None

    def capabilities(self, device: Device) -> Capabilities:
        return Capabilities() if has_bfloat16() else Capabilities(dtypes=frozenset(DTYPES) - {"bfloat16"})

    def preference(self, plan: Plan, device: Device) -> int:
        return ORACLE

    def check_inputs(self, *tensors: Array) -> None:
        check_tensors(*tensors)

    def to_native(self, array: Array) -> np.ndarray:
        return as_numpy(array)

    def from_native(self, array: np.ndarray, like: Array, dtype: str) -> Array:
        return as_kind_of(array, like, dtype)

    def from_host(self, array: np.ndarray, device: Device, dtype: str | None = None) -> Array:
        return host_array(array, dtype)

    def to_host(self, array: Array) -> np.ndarray:
        return as_numpy(array)
