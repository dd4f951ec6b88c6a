"""Arrays of any library that array-api-compat knows: their library, their dtype, a copy elsewhere.

This module imports no device library; it works with whatever the caller's arrays come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_cupy_array, to_device
from array_api_compat import device as device_of

Array = Any


def namespace(*arrays: Array) -> Any:
    """The array-API namespace of the one library that `arrays` come from.

    Raises:
        TypeError: no arrays, arrays of two libraries, or of one that array-api-compat does not know.
    """
    return array_namespace(*arrays)


def library_name(x: Array) -> str:
    """The name of the array library of `x`; subclasses such as torch.nn.Parameter belong to their base's."""
    try:
        return str(namespace(x).__name__).removeprefix("array_api_compat.")
    except TypeError:
        return type(x).__module__.partition(".")[0]


def dtype_name(x: Any) -> str:
    """The dtype of an array as a bare name, such as ``float32``, whatever library it comes from."""
    return str(getattr(x, "dtype", None)).rsplit(".", 1)[-1]


def array_facts(x: Any) -> tuple[Any, ...] | None:
    """What planning and choosing read off an array: its type, shape, dtype and device; None for None."""
    if x is None:
        return None
    try:
        return type(x), getattr(x, "shape", None), getattr(x, "dtype", None), getattr(x, "device", None)
    except RuntimeError:  # a nested tensor has no shape
        return type(x), None, None, None


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
