"""What is made once a process: OpenVINO's threads do not come along into a forked child, which makes it all anew."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Generic, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Made = TypeVar("Made")

# Each may hold a compiled model, its memory (20 MiB and more) and a thread for every core. A process uses few at a
# time: one a head dim and dtype.
_MOST = 8


class per_process(Generic[Parameters, Made]):  # a decorator
    """Cache a function's last results, in a forked child its own."""

    def __init__(self, function: Callable[Parameters, Made]) -> None:
        self.__wrapped__ = function
        self.__doc__ = function.__doc__
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave)

    def __call__(self, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Made:
        made: Made = self._cached(*args, **kwargs)  # type: ignore[arg-type]  # hashable, or Python says so
        return made

    def clear(self) -> None:
        """Forget all results."""
        self._cached.cache_clear()

    def size(self) -> int:
        """How many results are kept."""
        return int(self._cached.cache_info().currsize)

    def _renew(self) -> None:
        self._cached = lru_cache(maxsize=_MOST)(self.__wrapped__)

    def _leave(self) -> None:
        # To end what the parent made would wait for its threads, or crash without them: it is never ended in the child,
        # not even when Python ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._cached))
        self._renew()
