"""torch's own operators on the stand-in device: its memory is the host's, so torch's CPU kernels work on it.

The list is what a lowered plan uses beside the attention operators. An operator that is not on it goes to CANN,
which is not there, and fails: that nothing is read back from the device in a call shows in what is not listed
(`_local_scalar_dense`, `nonzero`, `masked_select`, `unique`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

OPERATORS = (
    *("index_select", "gather", "cat", "constant_pad_nd", "clone", "repeat_interleave.self_int"),
    *("sum", "sum.dim_IntList", "amax", "all.dim", "cumsum", "sort.stable", "bmm", "matmul"),
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum", "remainder.Scalar"),
    *("abs", "exp", "log", "clamp", "isnan", "isfinite", "where.self", "masked_fill.Scalar"),
    *("eq.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "eq.Scalar", "ne.Scalar", "lt.Scalar", "gt.Scalar"),
    *("ge.Tensor", "ge.Scalar", "minimum", "rsub.Scalar"),
    *("bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_not"),
    *("zeros", "ones", "zeros_like", "ones_like", "full_like", "scalar_tensor", "arange.start_step"),
)


def install() -> torch.library.Library:
    """Register the CPU kernels for NPU tensors; they stay while the library that is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    for name in OPERATORS:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, _on_host(operator), "PrivateUse1")
    library.impl("_to_copy", _cast, "PrivateUse1")
    return library


def _on_host(operator: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, _seen_by_host, (args, kwargs))
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        return tree_map_only(torch.Tensor, _on_device, operator(*args, **kwargs))

    return kernel


def _cast(x: torch.Tensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """Another dtype by the CPU, another device by torch_npu's own copy."""
    if dtype not in (None, x.dtype):
        x = _on_host(torch.ops.aten._to_copy.default)(x, dtype=dtype)
    return torch.empty(x.shape, dtype=x.dtype, device=device or x.device).copy_(x.contiguous())


def _seen_by_host(x: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor."""
    if x.device.type == "cpu":
        return x
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def _on_device(x: torch.Tensor) -> torch.Tensor:
    made = torch.empty(x.shape, dtype=x.dtype, device="npu")
    _seen_by_host(made).copy_(x)
    return made
