"""Torch CPU tensors and NumPy arrays seen as each other, for backends that take both.

torch is imported only to make a bfloat16 array that nothing else can hold; elsewhere a tensor can only exist
where torch already is.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from rainfusion.core.errors import ProblemError

Array = Any

_TRACE = "torch.compile and torch.export take rainfusion's calls as they are"


def on_cpu(array: Array) -> bool:
    """Whether `array` is a NumPy array or a torch tensor in host memory.

    A subclass of ndarray is not: it may be a vendor's, in memory of the vendor's own.
    """
    return type(array) in (np.ndarray, np.memmap) or (is_torch_array(array) and array.device.type == "cpu")


def as_numpy(array: Array) -> np.ndarray:
    """A host array as NumPy, the same memory except for bfloat16, which NumPy lacks and float32 holds."""
    if not is_torch_array(array):
        return array.astype(np.float32) if array.dtype.name == "bfloat16" else np.asarray(array)
    with outside_transforms():
        tensor = array.detach().resolve_neg()
        plain: np.ndarray = (tensor.float() if tensor.dtype == sys.modules["torch"].bfloat16 else tensor).numpy()
    return plain


def outside_transforms() -> AbstractContextManager[object]:
    """Where tensors are what they are: within a transform of torch.func, its level would wrap all that is made."""
    if sys.modules["torch"]._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    cleared = import_module("torch._functorch.pyfunctorch").temporarily_clear_interpreter_stack()
    outside: AbstractContextManager[object] = cleared
    return outside


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name; bfloat16 comes from the small package ml_dtypes.

    Raises:
        ProblemError: bfloat16 without ml_dtypes.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise ProblemError("NumPy has no bfloat16 of its own; pip install ml_dtypes, or pass torch tensors") from None
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def has_bfloat16() -> bool:
    """Whether anything here can hold bfloat16: ml_dtypes for NumPy arrays, or torch."""
    return any(find_spec(name) is not None for name in ("ml_dtypes", "torch"))


def host_array(array: np.ndarray, dtype: str | None) -> Array:
    """A NumPy array in the dtype of that name; a torch tensor where only torch can hold it."""
    if dtype is None:
        return array
    if dtype == "bfloat16" and find_spec("ml_dtypes") is None and find_spec("torch") is not None:
        torch = import_module("torch")
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return array.astype(numpy_dtype(dtype))


def as_kind_of(result: np.ndarray, like: Array, dtype: str) -> Array:
    """A NumPy result as the kind of array `like` is (NumPy, or torch on the CPU), in the dtype of that name."""
    if not is_torch_array(like):
        return result.astype(numpy_dtype(dtype), copy=False)
    torch = sys.modules["torch"]
    return torch.from_numpy(np.ascontiguousarray(result)).to(getattr(torch, dtype))


def check_tensors(*arrays: Array) -> None:
    """Refuse torch tensors whose memory cannot be read as it stands, or of which a derivative is expected.

    Arrays of other libraries pass. rainfusion computes the forward only, on plain strided memory: what is sparse,
    nested, distributed, wrapped by a transform of torch.func, or without data would be read as something it is not.

    Raises:
        ProblemError: it names the kind of tensor and the way out.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    tensors = [x for x in arrays if isinstance(x, torch.Tensor)]
    for x in tensors:
        reason = _lacks_memory(x) if _is_plain(x, torch) else _why_not_plain(x, torch)
        if reason:
            raise ProblemError(f"q, k and v must be tensors of plain strided memory; given {reason}")
    if tensors:
        _refuse_tracing(torch)
        _refuse_derivatives(tensors, torch)


def _is_plain(x: Array, torch: Any) -> bool:
    return (
        type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and x.layout is torch.strided
        and not x.is_nested
        and not x.is_quantized
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch._is_functional_tensor(x)
    )


def _lacks_memory(x: Array) -> str:
    """Why the memory of a plain tensor cannot be read; empty where it can. To read what was freed ends the process."""
    if x._is_zerotensor():
        return "one that stands for zeros and holds none; pass x.clone()"
    held = x.untyped_storage().nbytes()
    if held >= x.nbytes and not x.storage_offset():
        return ""
    last = sum([(n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)])
    if held < (x.storage_offset() + last + 1) * x.element_size() and x.numel():
        return "one whose memory was freed (a sharded parameter outside its forward?); gather it before the call"
    return ""


def _why_not_plain(x: Array, torch: Any) -> str:
    """The kind of a tensor that is not plain, and the way out."""
    functorch, name = torch._C._functorch, type(x).__name__
    kinds = (
        (
            functorch.is_batchedtensor(x),
            "one under torch.vmap; call rainfusion outside it, with that axis as the batch",
        ),
        (functorch.is_gradtrackingtensor(x), "one under torch.func.grad or jvp; rainfusion computes no derivatives"),
        (
            torch._is_functional_tensor(x) or name == "FunctionalTensor",
            f"one under torch.func.functionalize; call rainfusion outside it. {_TRACE}",
        ),
        (x.is_quantized, "a quantised one; pass x.dequantize()"),
        (x.is_nested, "a nested one; pad it (torch.nested.to_padded_tensor) and give kv_lengths"),
        (x.layout is not torch.strided, f"one with layout {x.layout}; convert it (to_dense)"),
        (name == "FakeTensor", f"a FakeTensor, which has no data; call rainfusion on real tensors. {_TRACE}"),
        (name == "DTensor", "a DTensor; call rainfusion on x.to_local() or x.full_tensor()"),
    )
    otherwise = f"a {name}, a subclass with operations of its own; convert it to a plain torch.Tensor"
    return next((kind for is_it, kind in kinds if is_it), otherwise)


def _refuse_tracing(torch: Any) -> None:
    """Refuse calls under a mode that records operations: what is computed here would become a constant there."""
    if torch._C._is_tracing():
        raise ProblemError(f"rainfusion is called where operations are traced by torch.jit.trace. {_TRACE}")
    if not torch._C._len_torch_dispatch_stack():
        return
    keys = torch._C._TorchDispatchModeKey
    for key, what in ((keys.PROXY, "traced by make_fx"), (keys.FUNCTIONAL, "functionalized"), (keys.FAKE, "faked")):
        if torch._C._get_dispatch_mode(key) is not None:
            raise ProblemError(f"rainfusion is called where operations are {what}; call it outside. {_TRACE}")


def _refuse_derivatives(tensors: list[Array], torch: Any) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ProblemError("q, k or v requires a gradient and rainfusion computes none; call it under torch.no_grad()")
    forward = torch.autograd.forward_ad
    if forward._current_level >= 0 and any(forward.unpack_dual(x).tangent is not None for x in tensors):
        raise ProblemError(
            "q, k or v carries a forward-mode tangent and rainfusion computes none; pass "
            "torch.autograd.forward_ad.unpack_dual(x).primal"
        )
