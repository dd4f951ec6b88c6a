"""Faults that backends and plugins showed during calls of this process, for `rainfusion.devices` to list."""

from __future__ import annotations

from collections import OrderedDict

from rainfusion.core.choice import Refusal

_MOST = 64
_noted: OrderedDict[Refusal, None] = OrderedDict()


def note(backend: str, stage: str, reason: str) -> None:
    """Remember what went wrong: at stage ``choose``, ``lower`` or ``run``."""
    _noted[Refusal(backend, stage, reason)] = None
    while len(_noted) > _MOST:
        _noted.popitem(last=False)


def forget(backend: str) -> None:
    """Forget the faults of a backend that was taken back."""
    for fault in [fault for fault in [*_noted] if fault.backend == backend]:
        _noted.pop(fault, None)


def noted() -> list[Refusal]:
    """The faults so far, each once."""
    return [*_noted]
