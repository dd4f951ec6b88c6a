"""Memory that is used again. Fresh pages from the system can cost as much as filling them, or several times that.

A denoiser calls for the same sizes layer after layer. An array from the pool gives its memory back when its last view
is gone, a result as soon as the model has done with it, and the next call for that size gets it.
"""

from __future__ import annotations

import ctypes
import math
import sys
import weakref
from itertools import count

import numpy as np

from rainfusion.core.locks import ProcessLock

KEPT = 2**28  # bytes that wait for the next call
_BLOCKS = 24  # and blocks, the newest: calls of one size take and give the same few, older ones are of other sizes


class Pool:
    """Arrays that share blocks of memory over time.

    Args:
        limit: bytes that may lie there unused.
    """

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._free: list[np.ndarray] = []
        self._lock = ProcessLock()

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of any content, C-contiguous."""
        size = math.prod(shape) * dtype.itemsize
        block = self._take(size)
        loan = _Loan(block)
        weakref.finalize(loan, self._give, block).atexit = False
        return np.asarray(loan)[:size].view(dtype).reshape(shape)

    def _take(self, size: int) -> np.ndarray:
        with self._lock:
            del self._free[:-_BLOCKS]
            fits = [at for at, block in enumerate(self._free) if size <= block.nbytes <= 2 * size]
            if fits:
                return self._free.pop(min(fits, key=lambda at: self._free[at].nbytes))
            while self._free and self.unused() + size > self._limit:
                self._free.pop(0)
        return np.empty(size, np.uint8)

    def _give(self, block: np.ndarray) -> None:
        # No lock: this runs wherever the last view goes, perhaps inside _take; appending is safe there.
        if self.unused() + block.nbytes <= self._limit:
            self._free.append(block)

    def unused(self) -> int:
        """Bytes that wait for the next call."""
        return sum(block.nbytes for block in self._free)


class _Loan:
    """What the arrays of one loan have as their base: when it is gone, so are they."""

    def __init__(self, block: np.ndarray) -> None:
        self.__array_interface__ = block.__array_interface__


_TRIMMED_EVERY = 16  # new plans; it takes milliseconds
_plans = count(1)


def new_plan() -> None:
    """Give pages back to the system now and then: arrays of many sizes leave the heap in pieces, which glibc keeps."""
    if next(_plans) % _TRIMMED_EVERY == 0 and sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)


POOL = Pool()
