"""A run of the fuzzer in one process: from seed to seed, resumable, with what it found in a file."""

from __future__ import annotations

import faulthandler
import json
import platform
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rainfusion
from tests.fuzz.bad import check_refused
from tests.fuzz.laws import LawBroken, Subject, broken_laws
from tests.fuzz.problems import SEEDS_A_KIND, draw_for

BACKENDS = ("reference", "torch", "openvino")
_BAD_EVERY = 10
_SECONDS_A_PROBLEM = 120
_CHUNK = SEEDS_A_KIND  # seeds that a worker takes at a time


class Hung(BaseException):
    """A problem that takes too long; no `Exception`, so that nothing on the way takes it for a refusal."""


@dataclass
class State:
    """How far a run is; written before every problem, so that a crash or a hang is known by its seed.

    Attributes:
        running: the seed of the problem that runs now; None between runs.
        workers: among how many processes the seeds are dealt out, `_CHUNK` at a time.
    """

    next_seed: int = 0
    workers: int = 1
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
            state.next_seed, state.running = state.following(state.running), None
        return state

    @staticmethod
    def was_running(path: Path) -> bool:
        """Whether the process that wrote this state ended within a problem."""
        return json.loads(path.read_text(encoding="utf-8"))["running"] is not None

    @classmethod
    def of_worker(cls, path: Path, start: int, worker: int, workers: int) -> State:
        """The state of one of several workers, or a new one.

        Raises:
            ValueError: the run was begun with another number of workers.
        """
        if not path.exists():
            return cls(next_seed=start - start % _CHUNK + worker * _CHUNK, workers=workers)
        state = cls.read(path)
        if state.workers != workers:
            raise ValueError(
                f"{path} is of a run with {state.workers} workers: go on with as many, or remove its files"
            )
        return state

    def following(self, seed: int) -> int:
        """The seed after this one: within its chunk, or the first of the chunk this worker takes next."""
        return seed + 1 if (seed + 1) % _CHUNK else seed + 1 + _CHUNK * (self.workers - 1)

    def write(self, path: Path) -> None:
        beside = path.with_name(path.name + ".new")  # a process that ends while it writes leaves the last state
        beside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def failures_of(seed: int, backends: tuple[str, ...], device: str = "cpu") -> list[dict[str, Any]]:
    """What does not hold for the problem of a seed; every tenth is one that must be refused."""
    try:
        with _limited(_SECONDS_A_PROBLEM), _strict_warnings():
            found = list(
                _refusals(seed, backends, device)
                if is_bad(seed)
                else broken_laws(Subject(draw_for(seed, device), device), backends)
            )
    except Hung:
        found = [("", f"still running after {_SECONDS_A_PROBLEM} s")]
    except Exception as error:  # of the fuzzer itself
        found = [("", f"{type(error).__name__}: {error}")]
    return [{"seed": seed, "backend": backend, "message": message[:500]} for backend, message in found]


def is_bad(seed: int) -> bool:
    """Whether the problem of a seed is one that does not fit."""
    return seed % _BAD_EVERY == _BAD_EVERY - 1


def installed(asked: tuple[str, ...], device: str = "cpu") -> tuple[str, ...]:
    """The backends asked for, or those of `BACKENDS` that have such a device here.

    Raises:
        BackendError: one that is asked for has none.
    """
    kind = device.partition(":")[0]
    ready = [found for found in rainfusion.devices() if found.status == "ready"]
    here = {found.backend for found in ready if kind == "cpu" or found.device.startswith(kind)}
    missing = [name for name in asked if name not in here]
    if missing or not here:
        there = ", ".join(f"{found.backend} on {found.device}" for found in ready)
        raise rainfusion.BackendError(
            f"{', '.join(missing or asked) or 'any backend'} on {device} was asked for; there are {there}"
        )
    return asked or tuple(name for name in BACKENDS if name in here)


def is_lost(device: str) -> bool:
    """Whether a device no longer answers in this process, as after an illegal access to its memory."""
    if not device.startswith("cuda"):
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def steps(
    state: State, path: Path, backends: tuple[str, ...], problems: int, minutes: float, device: str = "cpu"
) -> Iterator[list[Any]]:
    """Run problems until there have been as many, or that long, or the device is lost; yields the failures of each."""
    start, spent, last = time.monotonic(), state.seconds, state.problems + problems
    state.backends = sorted({*state.backends, *backends})
    try:
        while state.problems < last and time.monotonic() - start < 60 * minutes:
            state.running = state.next_seed
            state.write(path)
            found = failures_of(state.next_seed, backends, device)
            state.failures += found
            state.next_seed, state.problems = state.following(state.next_seed), state.problems + 1
            state.seconds = round(spent + time.monotonic() - start, 1)
            yield found
            if found and is_lost(device):
                return
    finally:  # where Python ends in order, by an interrupt as well, no problem is to blame
        state.running = None
        state.write(path)


def record(path: Path | None, states: Sequence[State], device: str) -> dict[str, Any]:
    """What a run amounts to, all workers together; also written to `path`, as JSON."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    facts = {
        "backends": sorted({backend for state in states for backend in state.backends}),
        "device": f"{device} ({name})",
        "versions": {package.__name__: package.__version__ for package in (rainfusion, torch, np)},
        "problems": sum(state.problems for state in states),
        "minutes": round(max((state.seconds for state in states), default=0.0) / 60, 1),
        "workers": len(states),
        "last_seed": max((state.next_seed for state in states), default=0) - 1,
        "failures": [failure for state in states for failure in state.failures],
    }
    if path is not None:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _refusals(seed: int, backends: tuple[str, ...], device: str) -> Iterator[tuple[str, str]]:
    for backend in backends:
        try:
            check_refused(seed, backend, device)
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
    """A warning is a failure, except those of how a budget is spent: small problems cannot spend one well.

    What torch's own modules call each other by, and will no longer, is no fault of ours either.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch(\.|$)")
        warnings.simplefilter("ignore", rainfusion.RainfusionWarning)
        yield
