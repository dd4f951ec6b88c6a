"""Dispatch: who runs a plan. Choosing a backend, registering one, lowering, and the one cache of executables."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rainfusion.core import choice as choosing
from rainfusion.core import faults, lowering
from rainfusion.core.backend import ORACLE, Backend, BackendSpec, Device
from rainfusion.core.blame import is_foreign
from rainfusion.core.checks import as_flag, shown
from rainfusion.core.choice import Candidate, Choice, Refusal
from rainfusion.core.errors import (
    BackendError,
    BackendUnavailableError,
    ProblemError,
    RainfusionWarning,
    SparsityWarning,
    SpeedWarning,
    warn_caller,
)
from rainfusion.core.executable import DEFINITION, Executable
from rainfusion.core.locks import ProcessLock
from rainfusion.core.ops import AttendQuantised
from rainfusion.core.plan import Plan
from rainfusion.plugins.manager import host

Array = Any
Value = TypeVar("Value")
_LONGEST_ADDRESS = 80
ENVIRONMENT = "RAINFUSION_BACKEND"
_in_use: ContextVar[str | None] = ContextVar("rainfusion_backend", default=None)


@dataclass(frozen=True)
class Prepared:
    """An executable, and what its callers are to be warned of.

    Attributes:
        settled: an equal call may take it up again; not so while a plugin that could run it has yet to answer.
    """

    executable: Executable
    notes: tuple[tuple[str, type[RainfusionWarning]], ...]
    settled: bool = True

    def warn(self) -> None:
        """Say what there is to say, at every call; Python's warning filters decide what is shown."""
        for message, category in self.notes:
            warn_caller(message, category)


class LruDict(OrderedDict[Any, Value], Generic[Value]):
    """A dictionary that forgets what was used least recently, beyond a number of entries; thread-safe."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit, self._lock = limit, ProcessLock()

    def find(self, key: Any) -> Value | None:
        """The value, or None; it then counts as used."""
        with self._lock:
            value = self.get(key)
            if value is not None:
                self.move_to_end(key)
            return value

    def keep(self, key: Any, value: Value) -> Value:
        """Keep a value; returns the one that is kept, another thread's if it was first."""
        with self._lock:
            value = self.setdefault(key, value)
            while len(self) > self._limit:
                self.popitem(last=False)
            return value


def restore(plan: Plan, backend: str, device: str) -> Executable:
    """The plan lowered for a device of that address, as a pickled executable or a saved graph names it.

    Raises:
        BackendError: the backend is not there, or finds no such device.
    """
    loaded = host().backend(backend)
    for found in loaded.devices():
        if str(found) == device:
            return cache.executable(plan, loaded, found)
    raise BackendUnavailableError(f"backend {backend!r} does not find {device} here")


class ExecutableCache:
    """Every executable that rainfusion keeps: by plan and device, and by the calls that led to it.

    Args:
        limit: plans that are kept lowered, and calls that are known; an executable lives while either names it.

    Attributes:
        restore: what a pickled executable calls when it is read.
    """

    def __init__(self, limit: int = 128) -> None:
        self.restore: Callable[[Plan, str, str], Executable] = restore
        self._plans: LruDict[Executable] = LruDict(limit)
        self._choices: LruDict[Choice] = LruDict(limit)
        self._calls: LruDict[Prepared] = LruDict(limit)
        self._unfit: LruDict[Refusal] = LruDict(limit)

    def executable(self, plan: Plan, backend: Backend, device: Device, *, strict: bool = False) -> Executable:
        """The plan lowered for a device, lowered now if it is not there."""
        strict = as_flag(strict, "strict", ProblemError)
        key = (plan, backend, str(device), strict)
        found = self._plans.find(key)
        if found is None:
            lowered = lowering.lower(plan, backend, device, strict=strict, restore=self.restore)
            found = self._plans.keep(key, lowered)
        return found

    def choice(self, plan: Plan, asked_for: Any, like: Array) -> Choice:
        """The backend for a plan where an array lives, chosen now if it was not."""
        key = self._choice_key(plan, asked_for, like)
        found = self._choices.find(key)
        if found is not None:
            return found
        chosen = _choose(plan, asked_for, like=like)
        return chosen if chosen.late else self._choices.keep(key, chosen)

    def pass_over(self, plan: Plan, asked_for: Any, like: Array, refusal: Refusal) -> None:
        """Choose another backend for a plan from now on, since this one could not lower it."""
        self._unfit.keep((plan, refusal.backend), refusal)
        self._choices.pop(self._choice_key(plan, asked_for, like), None)

    def unfit(self, plan: Plan, backend: str) -> Refusal | None:
        """Why a backend could not lower a plan."""
        return self._unfit.find((plan, backend))

    @staticmethod
    def _choice_key(plan: Plan, asked_for: Any, like: Array) -> tuple[Any, ...]:
        return plan, asked_for, type(like), str(getattr(like, "device", None))

    def call(self, key: Any) -> Prepared | None:
        """What was prepared for an equal call."""
        return None if key is None else self._calls.find(key)

    def remember(self, key: Any, prepared: Prepared) -> None:
        """Keep what was prepared for a call."""
        if key is not None and prepared.settled:
            self._calls.keep(key, prepared)

    def clear(self) -> None:
        """Let go of everything."""
        for kept in (self._plans, self._choices, self._calls, self._unfit):
            kept.clear()


cache = ExecutableCache()
"""The cache of this process; `cache.clear()` lets go of executables and their constants. What CUDA graphs have
captured stays with the backend, since a graph replays on it (`TritonBackend.captured`)."""


def prepare(plan: Plan, notes: tuple[str, ...], *, like: Array, backend: str | None) -> Prepared:
    """Choose a backend where `like` lives, lower the plan, and note what callers are to be warned of."""
    named = asked(backend)
    choice = cache.choice(plan, named, like)
    candidate = choice.candidate
    try:
        lowered = cache.executable(plan, candidate.backend, candidate.device)
    except BackendError as error:
        if named or not is_foreign(candidate.backend):  # an explicit choice never falls back
            raise
        cache.pass_over(plan, named, like, Refusal(candidate.backend.name, "lower", str(error)))
        warn_caller(f"{candidate} is passed over: {error}", RainfusionWarning)
        return prepare(plan, notes, like=like, backend=backend)
    warnings: list[tuple[str, type[RainfusionWarning]]] = [(note, SparsityWarning) for note in notes]
    if candidate.speedup is not None and candidate.speedup < 1:
        warnings.append(
            (
                f"skipping blocks does not pay here: {candidate} is estimated to take {1 / candidate.speedup:.1f} "
                f"times as long as dense attention over {plan.problem.q_len} x {plan.problem.kv_len} tokens; give "
                "sparsity=0 for that",
                SpeedWarning,
            )
        )
    if is_emulated(lowered) and candidate.preference != ORACLE:
        warnings.append(
            (
                f"{candidate} has no kernels of 8 bits for this plan: attention runs by its definition, which rounds "
                "as they would and takes longer than without a precision. Leave precision out where time matters",
                SpeedWarning,
            )
        )
    if choice.late:
        who = ", ".join(f"{refusal.backend} ({refusal.reason})" for refusal in choice.late)
        warnings.append(
            (
                f"this call runs on {candidate} and does not wait for {who}; RAINFUSION_PLUGIN_SECONDS sets how long "
                "calls wait, RAINFUSION_DISABLED_PLUGINS switches plugins off",
                RainfusionWarning,
            )
        )
    return Prepared(lowered, tuple(warnings), not choice.late)


def is_emulated(executable: Executable) -> bool:
    """Whether attention in 8 bits runs by its definition."""
    by_definition = [op for step in executable.steps if step.by == DEFINITION for op in step.segment.ops]
    return any(isinstance(op, AttendQuantised) for op in by_definition)


def choose(plan: Plan, *, like: Array = None, device: object = None, backend: str | None = None) -> Choice:
    """Which backend would run `plan` where the array `like` lives (or on `device`), why, and which are out.

    Raises:
        ProblemError: `like` and `device` together.
        BackendError: none would.
    """
    if like is not None and device is not None:
        raise ProblemError("like and device both say where; give one of them")
    return _choose(plan, asked(backend), like=like, device=device)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run everything inside the ``with`` block on one backend; nests, and is local to thread and task.

    Raises:
        UnknownBackendError: no plugin announced that name.
    """
    host().announced(backend)
    token = _in_use.set(backend)
    try:
        yield
    finally:
        _in_use.reset(token)


def register(spec: BackendSpec) -> None:
    """Announce a backend in this process; packages announce theirs by entry point instead.

    Raises:
        DuplicateBackendError: the name is taken.
    """
    host().register(spec)
    cache.clear()


def unregister(name: str) -> None:
    """Take back a backend announced by `register`.

    Raises:
        UnknownBackendError: it was not.
    """
    host().unregister(name)
    cache.clear()


def asked(backend: str | None) -> tuple[str, str] | None:
    """The backend asked for, and by what: the argument, `use`, the environment; None leaves the choice open."""
    if backend is not None:
        return host().announced(backend).spec.name, f"backend={backend!r}"
    within = _in_use.get()
    if within:
        return within, f"rainfusion.use({within!r})"
    environment = os.environ.get(ENVIRONMENT)
    return (environment, f"{ENVIRONMENT}={environment}") if environment else None


def _address(device: object) -> str:
    """What a device prints as."""
    try:
        address = str(device)
    except Exception:
        address = ""
    if not 0 < len(address) <= _LONGEST_ADDRESS:
        raise ProblemError(f"device={shown(device)} is no address; give one that rainfusion.devices lists, as 'cuda:0'")
    return address


def _choose(plan: Plan, asked_for: tuple[str, str] | None, *, like: Array = None, device: object = None) -> Choice:
    if not isinstance(plan, Plan):
        raise ProblemError(f"plan is a {type(plan).__name__}; give what rainfusion.plan makes")
    plugins, address = host(), None if device is None else _address(device)
    if asked_for:
        able, refusals = choosing.candidates(plan, [plugins.backend(asked_for[0])], array=like, device=address)
        return choosing.choose(plan, able, refusals, asked_for[1], plugins.override)
    able, refusals = _able(plan, like, address)
    if not able and plugins.wait():  # only those that are late may be able to
        able, refusals = _able(plan, like, address)
    return choosing.choose(plan, able, refusals, None, plugins.override)


def _able(plan: Plan, like: Array, device: str | None) -> tuple[list[Candidate], list[Refusal]]:
    plugins = host()
    loaded, missing = plugins.backends(like)
    able, rejected = choosing.candidates(plan, loaded, array=like, device=device, ask=plugins.ask)
    for refusal in rejected:
        if refusal.stage == "probe" and not refusal.late:
            faults.note(refusal.backend, "choose", refusal.reason)
    unfit = {c.backend.name: why for c in able if (why := cache.unfit(plan, c.backend.name)) is not None}
    return [c for c in able if c.backend.name not in unfit], [*missing, *rejected, *unfit.values()]
