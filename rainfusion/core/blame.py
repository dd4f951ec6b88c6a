"""Who failed: errors of a backend's code say its name, and what it returns is held against the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from rainfusion.core import faults
from rainfusion.core.backend import Backend, Kernel, Segment
from rainfusion.core.checks import shown
from rainfusion.core.choice import listed
from rainfusion.core.errors import BackendError, RainfusionError, said
from rainfusion.core.ops import ValueType

Array = Any
_MOST_KERNELS = 1024
_LIBRARIES = frozenset({"torch", "numpy", "cupy", "jax", "jaxlib", "dask", "ndonnx", "sparse"})


def is_foreign(backend: Backend) -> bool:
    """Whether a backend comes from another package."""
    return not type(backend).__module__.startswith("rainfusion.")


def blamed(backend: Backend, stage: str, error: BaseException) -> BaseException:
    """The error that a caller gets for what a backend's code raised, at stage ``lower`` or ``run``.

    Ours, an interrupt and a lack of memory are passed on as they are: callers tell them apart by their types.
    """
    if isinstance(error, RainfusionError | KeyboardInterrupt):
        if type(error) is BackendError:  # a breach of contract; the others a backend raises on purpose
            faults.note(backend.name, stage, str(error))
        return error
    if not is_foreign(backend) or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        if isinstance(error, Exception) and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"raised while backend {backend.name!r} was to {stage} a plan")
        return error
    faults.note(backend.name, stage, said(error))
    return BackendError(
        f"backend {backend.name!r} failed to {stage} this plan: {said(error)}; report it to its authors, or name "
        "another with backend='...'"
    )


@contextmanager
def naming(backend: Backend, stage: str) -> Iterator[None]:
    """Errors inside say the name of the backend."""
    try:
        yield
    except BaseException as error:
        named = blamed(backend, stage, error)
        if named is error:
            raise
        raise named from error


def checked_kernels(backend: Backend, kernels: Any) -> tuple[Kernel, ...]:
    """The kernels a backend offers.

    Raises:
        BackendError: something else than kernels.
    """
    what = f"kernels() of backend {backend.name!r}"
    found = listed(kernels, _MOST_KERNELS, what, "a list of Kernel")
    for kernel in found:
        if not isinstance(kernel, Kernel):
            raise BackendError(f"{what} gave {shown(kernel)}; give Kernel(understands, build)")
        if not isinstance(kernel.understands, frozenset | set) or not callable(kernel.build):
            raise BackendError(f"{what} gave {shown(kernel)}; give a frozenset of operation types and a function")
    return tuple(found)


Due = tuple[tuple[str, tuple[int, ...], str], ...]


def due_of(segment: Segment, types: Mapping[str, ValueType]) -> Due:
    """What a kernel owes for a segment: name, shape and kind of dtype of every output."""
    return tuple((name, types[name].shape, _kind(types[name].dtype)) for name in segment.outputs)


def check_made(backend: Backend, made: Any, due: Due, device: Any) -> None:
    """Refuse what a kernel returned where it is not what the plan says.

    Floats of another width pass: `Backend.from_native` converts them.

    Args:
        device: where the inputs are, as the arrays' own ``device`` says it.

    Raises:
        BackendError: it names the backend, the value and what is wrong.
    """
    for name, shape, kind in due:
        try:
            value = made[name]
            fits = value.shape == shape and _kind(value.dtype) == kind and getattr(value, "device", None) == device
        except (KeyError, TypeError, AttributeError, IndexError):
            fits = False
        if not fits:
            raise _breach(backend, f"a kernel of it returned {_described(made, name)} for {name}", shape, kind, device)


def check_result(backend: Backend, name: str, value: Any, like: Any, kind: ValueType) -> None:
    """Refuse a result that is not an array as the caller's.

    Raises:
        BackendError: it names the backend, the value and what is wrong.
    """
    device = getattr(like, "device", None)
    try:
        fits = value.shape == kind.shape and _named(value.dtype) == kind.dtype
        fits = fits and getattr(value, "device", None) == device and _same_library(value, like)
    except (TypeError, AttributeError):
        fits = False
    if not fits:
        given = f"its from_native returned {_described({name: value}, name)} for {name}"
        raise _breach(backend, given, kind.shape, f"{type(like).__name__} {kind.dtype}", device)


def _breach(backend: Backend, what: str, shape: Sequence[int], kind: str, device: Any) -> BackendError:
    where = "" if device is None else f" on {device}"
    return BackendError(
        f"backend {backend.name!r} broke its contract: {what} where {kind} {list(shape)}{where} is due; report it to "
        "its authors, or name another with backend='...'"
    )


def _described(made: Any, name: str) -> str:
    if not isinstance(made, Mapping):
        return f"{shown(made)}, no mapping by name,"
    if name not in made:
        return "nothing"
    value = made[name]
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return shown(value)
    device = getattr(value, "device", None)
    return (
        f"{type(value).__name__} {value.dtype} {shown(tuple(value.shape))}{'' if device is None else f' on {device}'}"
    )


@lru_cache(maxsize=64)
def _named(dtype: Any) -> str:
    return str(dtype).rsplit(".", 1)[-1]


@lru_cache(maxsize=64)
def _kind(dtype: Any) -> str:
    """``float``, ``int`` or ``bool``: what a dtype holds, whatever its width."""
    name: str = _named(dtype).rstrip("0123456789")
    return {"bfloat": "float", "uint": "int"}.get(name, name)


def _same_library(x: Array, y: Array) -> bool:
    return type(x) is type(y) or _library(type(x)) == _library(type(y))  # type: ignore[arg-type]  # classes have hashes


@lru_cache(maxsize=64)
def _library(kind: Any) -> str:
    """The package that an array's class, or the class of an array that it derives from, comes from."""
    packages: list[str] = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((package for package in packages if package in _LIBRARIES), packages[0])


Marks = tuple[tuple[str, Array, Any], ...]


def marks(given: Iterable[tuple[str, Array]]) -> Marks:
    """What shows that a kernel wrote into its inputs: the version of a torch tensor, some values of a NumPy array."""
    return tuple((name, x, _mark(x)) for name, x in given)


def check_unwritten(backend: Backend, marked: Marks) -> None:
    """Refuse kernels that write into what the caller gave.

    Raises:
        BackendError: it names the backend and the input.
    """
    for name, x, mark in marked:
        if _mark(x) != mark:
            what = f"a kernel of it wrote into {name.removeprefix('%')}"
            raise BackendError(
                f"backend {backend.name!r} broke its contract: {what}, which it may only read; the values there are "
                "lost. Report it to its authors, or name another with backend='...'"
            )


def _mark(x: Array) -> Any:
    if isinstance(x, np.ndarray):
        some = tuple(slice(None, None, max(1, size // 4)) for size in x.shape)
        return x[some].tobytes(), x[(slice(-1, None),) * x.ndim].tobytes()
    try:
        return x._version
    except (AttributeError, RuntimeError):  # inference tensors count no versions
        return None
