"""TorchArrays: the base class of backends that compute on torch tensors.

A backend on torch tensors derives from it and adds `devices`, `capabilities` and `kernels`. It keeps what every such
backend owes its callers: tensors that it cannot read are refused, modes that the caller has set do not reach the
kernels, and constants stay usable in every later call.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from rainfusion.backends.host_arrays import as_kind_of, as_numpy, check_tensors
from rainfusion.core.backend import Backend, Device
from rainfusion.core.errors import RainfusionWarning, warn_caller

Array = Any


class TorchArrays(Backend):
    """Arrays are torch tensors; NumPy arrays too, where a subclass's `device_of` takes them.

    Attributes:
        device_type: the ``torch.device.type`` whose tensors are this backend's; a backend of several types overrides
            `device_of` instead.
    """

    device_type: ClassVar[str] = ""

    def device_of(self, array: Array) -> Device | None:
        if isinstance(array, torch.Tensor) and array.device.type == self.device_type:
            return Device(array.device.type, array.device.index)
        return None

    def check_inputs(self, *tensors: Array) -> None:
        check_tensors(*tensors)

    @contextmanager
    def running(self, device: Device) -> Iterator[None]:
        """Without autograd, without autocast, and with no ``__torch_function__`` of modes or subclasses in between.

        Autocast would compute scores in half precision (Law 2); a default device would move what is allocated.
        """
        if device.type == "cpu":
            _threads.use()
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch._C.DisableTorchFunction():
            yield

    def to_native(self, array: Array) -> torch.Tensor:
        if isinstance(array, torch.Tensor):
            return array.resolve_neg() if array.is_neg() else array  # kernels read memory, not flags
        # Torch has neither read-only tensors nor strides that are negative or no multiple of an element.
        fits = array.flags.writeable and all(s >= 0 and s % array.itemsize == 0 for s in array.strides)
        return _from_numpy(array if fits else array.copy())

    def from_native(self, array: torch.Tensor, like: Array, dtype: str) -> Array:
        if isinstance(like, torch.Tensor):
            return array.to(getattr(torch, dtype))
        return as_kind_of(as_numpy(array.cpu()), like, dtype)

    def from_host(self, array: np.ndarray, device: Device, dtype: str | None = None) -> torch.Tensor:
        with all_modes_off():
            tensor = _from_numpy(np.array(array))
            tensor = tensor if dtype is None else tensor.to(getattr(torch, dtype))
            return tensor.to(str(device))

    def to_host(self, array: Array) -> np.ndarray:
        return as_numpy(array.cpu() if isinstance(array, torch.Tensor) else array)

    def synchronize(self, device: Device) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(str(device))


class _Threads:
    """Whether torch's threads on the CPU are in this process: OpenMP waits without end for those a fork left behind."""

    def __init__(self) -> None:
        self._used = self._lost = False
        if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
            os.register_at_fork(after_in_child=self._leave)

    def use(self) -> None:
        """Before work on the CPU: where threads were lost, work on this one alone, and say so once."""
        self._used = True
        if not self._lost:
            return
        self._lost = False
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
            warn_caller(
                "torch worked on several threads before this process was forked. They are not here, so torch works on "
                "one thread now (torch.set_num_threads(1)); start processes by 'spawn' to use more",
                RainfusionWarning,
            )

    def _leave(self) -> None:
        self._lost = self._lost or self._used


_threads = _Threads()


@contextmanager
def all_modes_off() -> Iterator[None]:
    """Tensors made in here are ordinary ones, whatever mode or transform the caller is under.

    A constant that is made in the first call serves all later ones; made under FakeTensorMode, functionalization,
    inference mode, a transform of torch.func or a default device, it would carry that along.
    """
    functionalize = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
    with ExitStack() as off:
        off.enter_context(torch.inference_mode(False))
        off.enter_context(_disable_current_modes())
        off.enter_context(temporarily_clear_interpreter_stack())
        off.enter_context(torch._C._ExcludeDispatchKeyGuard(functionalize))
        off.enter_context(torch._C.DisableTorchFunction())
        yield


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    """A NumPy array as a tensor of the same memory; bfloat16 as ml_dtypes has it."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
