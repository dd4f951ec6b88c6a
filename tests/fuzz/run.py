"""A run of the fuzzer: from seed to seed, resumable, with what it found in a file."""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rainfusion
from tests.fuzz.bad import check_refused
from tests.fuzz.laws import LawBroken, Subject, broken_laws
from tests.fuzz.problems import draw

BACKENDS = ("reference", "torch", "openvino")
_BAD_EVERY = 10
_SECONDS_A_PROBLEM = 120


class Hung(BaseException):
    """A problem that takes too long; no `Exception`, so that nothing on the way takes it for a refusal."""


@dataclass
class State:
    """How far a run is; written before every problem, so that a crash or a hang is known by its seed.

    Attributes:
        running: the seed of the problem that runs now; None between runs.
    """

    next_seed: int = 0
    problems: int = 0
    seconds: float = 0.0
    backends: list[str] = field(default_factory=list)
    running: int | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> State:
        """The state of an earlier run, or a new one; a problem that did not end is one of its failures."""
        if not path.exists():
            return cls()
        state = cls(**json.loads(path.read_text(encoding="utf-8")))
        if state.running is not None:
            state.failures.append({"seed": state.running, "backend": "", "message": "the process ended within it"})
            state.next_seed, state.running = state.running + 1, None
        return state

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def failures_of(seed: int, backends: tuple[str, ...]) -> list[dict[str, Any]]:
    """What does not hold for the problem of a seed; every tenth is one that must be refused."""
    try:
        with _limited(_SECONDS_A_PROBLEM), _strict_warnings():
            found = list(_refusals(seed, backends) if is_bad(seed) else broken_laws(Subject(draw(seed)), backends))
    except Hung:
        found = [("", f"still running after {_SECONDS_A_PROBLEM} s")]
    except Exception as error:  # of the fuzzer itself
        found = [("", f"{type(error).__name__}: {error}")]
    return [{"seed": seed, "backend": backend, "message": message[:500]} for backend, message in found]


def is_bad(seed: int) -> bool:
    """Whether the problem of a seed is one that does not fit."""
    return seed % _BAD_EVERY == _BAD_EVERY - 1


def installed(asked: tuple[str, ...]) -> tuple[str, ...]:
    """The backends asked for, or those of `BACKENDS` that have a device here.

    Raises:
        BackendError: one that is asked for has none.
    """
    here = {device.backend for device in rainfusion.devices() if device.status == "ready"}
    missing = [name for name in asked if name not in here]
    if missing:
        raise rainfusion.BackendError(f"{', '.join(missing)} has no device here; there are {', '.join(sorted(here))}")
    return asked or tuple(name for name in BACKENDS if name in here)


def steps(state: State, path: Path, backends: tuple[str, ...], problems: int, minutes: float) -> Iterator[list[Any]]:
    """Run problems until there have been as many, or that long; yields the failures of each."""
    start, spent, last = time.monotonic(), state.seconds, state.problems + problems
    state.backends = sorted({*state.backends, *backends})
    try:
        while state.problems < last and time.monotonic() - start < 60 * minutes:
            state.running = state.next_seed
            state.write(path)
            found = failures_of(state.next_seed, backends)
            state.failures += found
            state.next_seed, state.problems = state.next_seed + 1, state.problems + 1
            state.seconds = round(spent + time.monotonic() - start, 1)
            yield found
    finally:  # where Python ends in order, by an interrupt as well, no problem is to blame
        state.running = None
        state.write(path)


def _refusals(seed: int, backends: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for backend in backends:
        try:
            check_refused(seed, backend)
        except LawBroken as error:
            yield backend, str(error)
        except Exception as error:
            yield backend, f"refused by {type(error).__name__}: {error}"


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise `Hung` after that time; where Python cannot, in a call that does not return, end the process."""

    def stop(number: int, frame: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(2 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _strict_warnings() -> Iterator[None]:
    """A warning is a failure, except those of how a budget is spent: small problems cannot spend one well."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", rainfusion.RainfusionWarning)
        yield
