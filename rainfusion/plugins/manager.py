"""PluginHost: finds plugins, keeps what they announce, loads a backend when it is used.

A plugin that fails does not affect the others: each is loaded, asked and probed in a try of its own, and the reason
is listed by `rainfusion devices`. Those of other packages answer in threads of their own; a call waits for them a
moment (`rainfusion.plugins.answers`), and goes on without those that are late.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import EntryPoint
from typing import Any, cast

import pluggy

from rainfusion.core import faults
from rainfusion.core.backend import Backend, BackendSpec
from rainfusion.core.checks import shown
from rainfusion.core.choice import Answered, Candidate, Refusal, listed
from rainfusion.core.errors import (
    FAILURES,
    BackendError,
    BackendUnavailableError,
    DuplicateBackendError,
    RainfusionWarning,
    UnknownBackendError,
    readable,
    said,
    warn_caller,
)
from rainfusion.core.locks import ProcessLock
from rainfusion.core.plan import Plan
from rainfusion.plugins import hookspecs
from rainfusion.plugins.answers import LIMIT, Answer, PluginFailed, PluginLate, patience
from rainfusion.plugins.installed import OURS, distribution_of, entries, is_builtin, origin
from rainfusion.plugins.loading import array_kind, checked_spec, load, owns

BUILTIN = "builtin"
WANTED, DISABLED = "RAINFUSION_PLUGINS", "RAINFUSION_DISABLED_PLUGINS"
_SWITCHES = f"{WANTED} or {DISABLED}"
REGISTERED = "rainfusion.register"
REFERENCE = BackendSpec("reference", "rainfusion.backends.reference:ReferenceBackend", arrays=("numpy", "torch:cpu"))
_MOST_SPECS = 256


@dataclass(frozen=True)
class Announced:
    """A backend spec and the plugin it came from.

    Attributes:
        trusted: it is one of this package's own, which is asked in the caller's thread.
    """

    spec: BackendSpec
    plugin: str
    trusted: bool = False


@dataclass(frozen=True)
class Announcement:
    """What a plugin says when it is loaded: the plugin itself, and the specs of its backends."""

    plugin: Any  # None where it was asked in another process
    specs: tuple[BackendSpec, ...]


Announce = Callable[[EntryPoint], Answer[Announcement]]


def announcement(entry: EntryPoint) -> Announcement:
    """Load a plugin and have it announce its backends; whatever it raises is raised."""
    trial = pluggy.PluginManager("rainfusion")  # of its own: a plugin that fails half-way leaves nothing behind
    trial.add_hookspecs(hookspecs)
    plugin = entry.load()
    trial.register(plugin, name=origin(entry))
    trial.check_pending()  # refuses a misspelt hook
    specs = []
    for hook in trial.hook.rainfusion_backends.get_hookimpls():
        given = cast(Callable[[], Any], hook.function)()
        specs += listed(given, _MOST_SPECS, "rainfusion_backends", "a list of BackendSpec")
    return Announcement(plugin, tuple(map(checked_spec, specs)))


def announce(entry: EntryPoint) -> Answer[Announcement]:
    """Ask a plugin of another package for its backends, in this process."""
    return Answer(partial(announcement, entry))


class PluginHost:
    """All plugins of one process.

    Args:
        environ: where ``RAINFUSION_PLUGINS`` (``builtin``, or plugin names; default all) and
            ``RAINFUSION_DISABLED_PLUGINS`` (plugin names) are read; both take commas.
        found: the entry points to consider (default: those installed).
        announce: how the plugins of other packages are asked.
        broken: the distributions that could not be read, where `found` is given.
    """

    def __init__(
        self,
        environ: Mapping[str, str] = os.environ,
        found: Iterable[EntryPoint] | None = None,
        announce: Announce = announce,
        broken: Iterable[Refusal] = (),
    ) -> None:
        self.manager = pluggy.PluginManager("rainfusion")
        self.manager.add_hookspecs(hookspecs)
        self._failures: list[Refusal] = [*broken]
        self._announced: dict[str, list[Announced]] = {REFERENCE.name: [Announced(REFERENCE, OURS, True)]}
        self._loaded: dict[str, Backend] = {}
        self._late: dict[str, Answer[Any]] = {}  # backends that did not answer in time
        self._unsettled: list[tuple[EntryPoint, Answer[Announcement]]] = []
        self._settling = ProcessLock()
        if found is None:
            found, self._failures = entries()
        found = sorted(found, key=_builtin_first)
        for entry in found:
            if not self.enables(entry, environ):
                self._failures.append(Refusal(entry.name, "disabled", f"switched off by {_SWITCHES}"))
            elif is_builtin(entry):
                self._take(entry, partial(announcement, entry))
            else:
                self._unsettled.append((entry, announce(entry)))
        self.settle(patience())
        for name in sorted(_names(environ, WANTED) | _names(environ, DISABLED) - {BUILTIN}):
            if name not in {BUILTIN, *(entry.name for entry in found)}:
                self._failures.append(Refusal(name, "disabled", f"{_SWITCHES} names it, but no plugin has that name"))

    # -- plugins -----------------------------------------------------------------------------------

    @property
    def failures(self) -> list[Refusal]:
        """The plugins that are out, and why; those that have not announced yet are among them."""
        return self._failures + [
            Refusal(entry.name, "load", f"plugin {origin(entry)}: it has not announced its backends yet", late=True)
            for entry, _ in self._unsettled
        ]

    def settle(self, seconds: float) -> None:
        """Take in what plugins have announced meanwhile; wait for the others, until so long after they were asked."""
        waiting = self._unsettled
        for _, answer in waiting:
            answer.wait(seconds, since_asked=True)
        if not waiting:
            return
        with self._settling:
            for pair in [pair for pair in self._unsettled if pair[1].done or pair[1].overdue]:
                self._unsettled = [other for other in self._unsettled if other is not pair]
                self._take(pair[0], partial(pair[1].within, 0))

    def _take(self, entry: EntryPoint, announced: Callable[[], Announcement]) -> None:
        try:
            given = announced()
            if given.plugin is not None:
                self.manager.register(given.plugin, name=origin(entry))
        except PluginLate:
            reason = f"plugin {origin(entry)}: it did not announce its backends within {LIMIT:g} s"
            self._failures.append(Refusal(entry.name, "load", reason))
        except FAILURES as error:
            reason = str(error) if isinstance(error, PluginFailed) else said(error)
            self._failures.append(Refusal(entry.name, "load", f"plugin {origin(entry)}: {reason}"))
        else:
            for spec in given.specs:
                self._claim(Announced(spec, origin(entry), is_builtin(entry)), entry)

    def _claim(self, claim: Announced, entry: EntryPoint) -> None:
        name = claim.spec.name
        if any(other.trusted for other in self._announced.get(name, ())):
            reason = f"plugin {origin(entry)} announces a backend {name!r}, a name of rainfusion's own; choose another"
            self._failures.append(Refusal(entry.name, "load", reason))
            return
        self._announced.setdefault(name, []).append(claim)

    @staticmethod
    def enables(entry: EntryPoint, environ: Mapping[str, str] = os.environ) -> bool:
        """Whether the environment lets a plugin be loaded."""
        wanted = _names(environ, WANTED)
        builtin = distribution_of(entry) == OURS and BUILTIN in wanted
        return (not wanted or entry.name in wanted or builtin) and entry.name not in _names(environ, DISABLED)

    def adopt(self, other: PluginHost) -> None:
        """Take over what `register` announced to another host."""
        for name, claims in [*other._announced.items()]:
            if [claim.plugin for claim in claims] == [REGISTERED]:
                self._announced.setdefault(name, []).extend(claims)

    def register(self, spec: BackendSpec) -> None:
        """Announce a backend at run time.

        Raises:
            DuplicateBackendError: the name is taken.
            BackendError: not a well-formed spec.
        """
        spec = checked_spec(spec)
        if spec.name in self._announced:
            taken = self._announced[spec.name][0]
            raise DuplicateBackendError(
                f"backend {spec.name!r} ({spec.target}) is already announced by {taken.plugin} ({taken.spec.target}); "
                "choose another name"
            )
        self._announced[spec.name] = [Announced(spec, REGISTERED)]

    def unregister(self, name: str) -> None:
        """Take back a backend announced by `register`."""
        claims = self._announced.get(name, []) if isinstance(name, str) else []
        if [a.plugin for a in claims] != [REGISTERED]:
            raise UnknownBackendError(f"backend {shown(name)} was not announced by rainfusion.register")
        del self._announced[name]
        self._loaded.pop(name, None)
        self._late.pop(name, None)
        faults.forget(name)

    # -- backends ----------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Every announced backend name."""
        self.settle(0)
        return tuple(self._announced)

    def announced(self, name: str) -> Announced:
        """The spec of a backend, and the plugin that announced it.

        Raises:
            UnknownBackendError: no plugin did.
            DuplicateBackendError: more than one did.
        """
        claims = self._announced.get(name, []) if isinstance(name, str) else []
        if not claims and self._unsettled:  # a caller that asks for a name waits for the plugin that may have it
            self.settle(LIMIT)
            claims = self._announced.get(name, []) if isinstance(name, str) else []
        if not claims:
            failed = next((f for f in self.failures if isinstance(name, str) and f.backend == name), None)
            hint = f" (plugin {name!r} is out: {failed.reason})" if failed else ""
            raise UnknownBackendError(
                f"backend {shown(name)} is not known{hint}; choose one of {', '.join(self.names)}"
            )
        if len(claims) > 1:
            both = " and ".join(f"{a.plugin} ({a.spec.target})" for a in claims)
            raise DuplicateBackendError(
                f"backend {name!r} is announced by {both}; switch one off with RAINFUSION_DISABLED_PLUGINS"
            )
        return claims[0]

    def backend(self, name: str) -> Backend:
        """The backend of that name, loaded once.

        Raises:
            UnknownBackendError, DuplicateBackendError: as `announced`.
            BackendUnavailableError: something it requires is missing, or loading it failed.
        """
        if name not in self._loaded:
            self._loaded[name] = load(self.announced(name).spec)
        return self._loaded[name]

    def backends(self, like: Any = None) -> tuple[list[Backend], list[Refusal]]:
        """Every backend that loads here, and why the others do not.

        Args:
            like: only load those that can own this array.
        """
        loaded: list[Backend] = []
        refusals: list[Refusal] = []
        kind = None if like is None else array_kind(like)
        for name in self.names:
            arrays = self._announced[name][0].spec.arrays
            if kind is not None and not owns(arrays, kind):
                refusals.append(Refusal(name, "reject", f"owns {', '.join(arrays)} arrays; this is {kind}"))
                continue
            backend, refusal = self._answer(name, "load", partial(self._load, name))
            loaded += [backend] if backend is not None else []
            refusals += [refusal] if refusal is not None else []
        return loaded, self.failures + refusals

    def _load(self, name: str) -> tuple[Backend | None, Refusal | None]:
        try:
            return self.backend(name), None
        except BackendUnavailableError as error:
            return None, Refusal(name, "load", error.reason, error.install)
        except BackendError as error:
            return None, Refusal(name, "load", str(error))

    def ask(self, backend: Backend, question: Callable[[], Answered]) -> Answered:
        """Put a question to a backend: what it can run; one that fails or is late has no candidates."""
        found, refusal = self._answer(backend.name, "probe", question)
        return found or [], refusal

    def _answer(
        self, name: str, stage: str, question: Callable[[], tuple[Any, Refusal | None]]
    ) -> tuple[Any, Refusal | None]:
        """What a backend answers; one of another package for which a call has waited is not waited for again."""
        claims = self._announced.get(name, ())
        if all(claim.trusted for claim in claims):
            return question()
        late = self._late.get(name)
        if late is not None and not late.done:
            reason = f"no answer within {LIMIT:g} s" if late.overdue else "it has not answered yet"
            return None, Refusal(name, stage, reason, late=not late.overdue)
        self._late.pop(name, None)
        answer: Answer[Any] = Answer(question)
        try:
            given: tuple[Any, Refusal | None] = answer.within(patience())
        except PluginFailed as error:
            return None, Refusal(name, stage, str(error))
        except PluginLate as error:
            self._late[name] = answer
            return None, Refusal(name, stage, str(error), late=True)
        return given

    def wait(self) -> bool:
        """Wait for what is late; whether there was any."""
        unsettled, late = bool(self._unsettled), [answer for answer in self._late.values() if not answer.overdue]
        self.settle(LIMIT)
        for answer in late:
            answer.wait(LIMIT, since_asked=True)
        return unsettled or bool(late)

    def override(self, plan: Plan, candidates: Sequence[Candidate]) -> Candidate | None:
        """The first choice that a plugin's `rainfusion_choose_backend` makes; a hook that fails is warned of."""
        hooks = self.manager.hook.rainfusion_choose_backend.get_hookimpls()
        for hook in reversed(hooks):  # in pluggy's order; a call through pluggy would end at the first that raises
            given = {"plan": plan, "candidates": tuple(candidates)}
            choose = partial(cast(Any, hook.function), *(given[name] for name in hook.argnames))
            answer: Answer[Any] = Answer(choose)
            try:
                chosen = answer.within(patience())
            except BackendError as error:
                self._complain(hook.plugin_name, f"failed: {error}")
                continue
            if chosen is None:
                continue
            known = [c for c in candidates if type(chosen) is Candidate and _is_same(c, chosen)]
            if known:
                return known[0]
            self._complain(
                hook.plugin_name,
                f"gave {shown(chosen)}, which is no candidate; return one of `candidates`, or None to abstain",
            )
        return None

    @staticmethod
    def _complain(plugin: str, what: str) -> None:
        faults.note(plugin, "choose", f"rainfusion_choose_backend {what}")
        warn_caller(f"rainfusion_choose_backend of {readable(plugin)} {what}", RainfusionWarning)


def _is_same(candidate: Candidate, chosen: Candidate) -> bool:
    return chosen.backend is candidate.backend and chosen.device is candidate.device


_creating = ProcessLock()


def host() -> PluginHost:
    """The host of this process; threads that ask at once get the same one."""
    with _creating:
        return _host()


@cache
def _host() -> PluginHost:
    return PluginHost()


def host_so_far() -> PluginHost | None:
    """The host of this process, if something has asked for it."""
    return _host() if _host.cache_info().currsize else None


def _names(environ: Mapping[str, str], variable: str) -> frozenset[str]:
    return frozenset(name.strip() for name in environ.get(variable, "").split(",") if name.strip())


def _builtin_first(entry: EntryPoint) -> tuple[bool, str]:
    return (not is_builtin(entry), entry.name)
