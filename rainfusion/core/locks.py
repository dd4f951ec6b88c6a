"""Locks that a forked child finds open: the threads that held them are not there to give them back."""

from __future__ import annotations

import os
from threading import RLock
from typing import Any
from weakref import WeakSet


class ProcessLock:
    """A re-entrant lock between the threads of one process.

    After a fork the child has one thread, the one that forked. What another thread held is open there; what it holds
    itself it still holds. State under such a lock must be good after each of its changes, or be made anew in the child.
    """

    def __init__(self) -> None:
        self._lock: Any = RLock()
        _all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _open(self) -> None:
        if not self._lock._is_owned():  # by this thread; as threading.Condition asks
            self._lock = RLock()


_all: WeakSet[ProcessLock] = WeakSet()


def _open_all() -> None:
    for lock in list(_all):
        lock._open()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_open_all)
