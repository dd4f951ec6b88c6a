"""Arrays of any library that array-api-compat knows: their library, their dtype, a copy elsewhere.

This module imports no device library; it works with whatever the caller's arrays come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, to_device
from array_api_compat import device as device_of

from rainfusion.core.errors import said

Array = Any


def namespace(*arrays: Array) -> Any:
    """The array-API namespace of the one library that `arrays` come from.

    Raises:
        TypeError: no arrays, arrays of two libraries, or of one that array-api-compat does not know.
    """
    for x in arrays:
        if x is None or isinstance(x, bool | int | float | complex):  # array-api-compat passes over these
            raise TypeError(f"{type(x).__name__} is not a supported array type")
    return array_namespace(*arrays)


def library_name(x: Array) -> str:
    """The name of the array library of `x`; subclasses such as torch.nn.Parameter belong to their base's."""
    try:
        return str(namespace(x).__name__).removeprefix("array_api_compat.")
    except Exception:  # no array, or an object whose attributes fail
        return type(x).__module__.partition(".")[0]


def dtype_name(x: Any) -> str:
    """The dtype of an array as a bare name, such as ``float32``, whatever library it comes from."""
    try:
        return str(getattr(x, "dtype", None)).rsplit(".", 1)[-1][:80]
    except Exception:  # not an array, and its attributes fail
        return "unknown"


def shape_of(x: Any) -> tuple[int, ...] | None:
    """The shape of an array as numbers; None for what has none: a list, a nested tensor, a tracer's stand-in."""
    try:
        return tuple([int(n) for n in x.shape])
    except Exception:  # each library fails in its own way
        return None


def cannot(arrays: Mapping[str, Any], be: str, error: Exception) -> str:
    """The message for arrays by argument that their library does not compute with, such as sparse ones."""
    kinds = ", ".join(dict.fromkeys(f"{type(x).__module__}.{type(x).__name__}" for x in arrays.values()))
    return f"{', '.join(arrays)} ({kinds}) cannot {be}: {said(error)}; give plain, dense arrays of one library"


def array_facts(x: Any) -> tuple[Any, ...] | None:
    """What planning and choosing read off an array: its type, shape, dtype and device; None for None."""
    if x is None:
        return None
    try:
        return type(x), getattr(x, "shape", None), getattr(x, "dtype", None), getattr(x, "device", None)
    except Exception:  # a nested tensor has no shape
        return type(x), None, None, None


def how_to_pass(x: Any) -> str:
    """In what form to pass an array that no backend owns, in brackets; empty where nothing is known of it."""
    if isinstance(x, np.ma.MaskedArray):
        return " (pass x.filled(0), and hide blocks with a mask)"
    if isinstance(x, np.ndarray) and type(x) is not np.ndarray:  # it may be a vendor's, in memory of the vendor's own
        return " (pass numpy.asarray(x))"
    return ""


def to_numpy(x: Array) -> np.ndarray:
    """A copy on the host (or a view, where the memory is the host's) of an array of any library."""
    if is_cupy_array(x):
        x = x.get()
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)


def moved(x: Array, like: Array) -> Array:
    """`x` in the library and on the device of `like`: itself if it is there already, otherwise a copy.

    Only a copy between two libraries goes through the host.
    """
    xp = namespace(like)
    if namespace(x) is not xp:
        return xp.asarray(to_numpy(x).copy(), device=device_of(like))
    return x if device_of(x) == device_of(like) else to_device(x, device_of(like))
