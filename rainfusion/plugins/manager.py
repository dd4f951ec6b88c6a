"""PluginHost: finds plugins, keeps what they announce, loads a backend when it is used.

A plugin that fails does not affect the others: each is loaded, asked and probed in a try of its own, and the reason
is listed by `rainfusion devices`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from threading import RLock
from typing import Any, cast

import pluggy

from rainfusion.core.backend import Backend, BackendSpec
from rainfusion.core.checks import shown
from rainfusion.core.choice import Candidate, Refusal
from rainfusion.core.errors import (
    BackendError,
    BackendUnavailableError,
    DuplicateBackendError,
    RainfusionWarning,
    UnknownBackendError,
    warn_caller,
)
from rainfusion.core.plan import Plan
from rainfusion.plugins import hookspecs
from rainfusion.plugins.loading import FAILURES, array_kind, checked_spec, load, owns, said

GROUP = "rainfusion"
BUILTIN = "builtin"
REFERENCE = BackendSpec("reference", "rainfusion.backends.reference:ReferenceBackend", arrays=("numpy", "torch:cpu"))


@dataclass(frozen=True)
class Announced:
    """A backend spec and the plugin it came from."""

    spec: BackendSpec
    plugin: str


class PluginHost:
    """All plugins of one process.

    Args:
        environ: where ``RAINFUSION_PLUGINS`` (``builtin``, or plugin names; default all) and
            ``RAINFUSION_DISABLED_PLUGINS`` (plugin names) are read; both take commas.
        found: the entry points to consider (default: those installed).
    """

    def __init__(self, environ: Mapping[str, str] = os.environ, found: Iterable[EntryPoint] | None = None) -> None:
        self.manager = pluggy.PluginManager("rainfusion")
        self.manager.add_hookspecs(hookspecs)
        self.failures: list[Refusal] = []
        self._announced: dict[str, list[Announced]] = {REFERENCE.name: [Announced(REFERENCE, "rainfusion")]}
        self._loaded: dict[str, Backend] = {}
        self._wanted = _names(environ.get("RAINFUSION_PLUGINS", ""))
        self._disabled = _names(environ.get("RAINFUSION_DISABLED_PLUGINS", ""))
        entries = sorted(entry_points(group=GROUP) if found is None else found, key=_builtin_first)
        for entry in entries:
            self._load_plugin(entry)
        for name in sorted((self._wanted | self._disabled) - {BUILTIN} - {entry.name for entry in entries}):
            reason = "RAINFUSION_PLUGINS or RAINFUSION_DISABLED_PLUGINS names it, but no plugin has that name"
            self.failures.append(Refusal(name, "disabled", reason))

    # -- plugins -----------------------------------------------------------------------------------

    def _load_plugin(self, entry: EntryPoint) -> None:
        origin = f"{entry.name} ({_distribution(entry)})"
        if not self._is_enabled(entry):
            reason = "switched off by RAINFUSION_PLUGINS or RAINFUSION_DISABLED_PLUGINS"
            self.failures.append(Refusal(entry.name, "disabled", reason))
            return
        try:
            plugin = entry.load()
            self.manager.register(plugin, name=origin)
            self.manager.check_pending()  # refuses a misspelt hook
            specs = [checked_spec(spec) for spec in self._specs_of(plugin)]
        except FAILURES as error:
            self.failures.append(Refusal(entry.name, "load", f"plugin {origin}: {said(error)}"))
            if self.manager.has_plugin(origin):
                self.manager.unregister(name=origin)
            return
        for spec in specs:
            self._announced.setdefault(spec.name, []).append(Announced(spec, origin))

    def _is_enabled(self, entry: EntryPoint) -> bool:
        builtin = _distribution(entry) == "rainfusion"
        wanted = not self._wanted or entry.name in self._wanted or (builtin and BUILTIN in self._wanted)
        return wanted and entry.name not in self._disabled

    def _specs_of(self, plugin: Any) -> list[BackendSpec]:
        hooks = self.manager.hook.rainfusion_backends.get_hookimpls()
        calls = [cast(Callable[[], Iterable[BackendSpec]], hook.function) for hook in hooks if hook.plugin is plugin]
        return [spec for call in calls for spec in call()]

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
        self._announced[spec.name] = [Announced(spec, "rainfusion.register")]

    def unregister(self, name: str) -> None:
        """Take back a backend announced by `register`."""
        claims = self._announced.get(name, []) if isinstance(name, str) else []
        if [a.plugin for a in claims] != ["rainfusion.register"]:
            raise UnknownBackendError(f"backend {shown(name)} was not announced by rainfusion.register")
        del self._announced[name]
        self._loaded.pop(name, None)

    # -- backends ----------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Every announced backend name."""
        return tuple(self._announced)

    def announced(self, name: str) -> Announced:
        """The spec of a backend, and the plugin that announced it.

        Raises:
            UnknownBackendError: no plugin did.
            DuplicateBackendError: more than one did.
        """
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
        loaded, refusals = [], list(self.failures)
        kind = None if like is None else array_kind(like)
        for name in self.names:
            arrays = self._announced[name][0].spec.arrays
            if kind is not None and not owns(arrays, kind):
                refusals.append(Refusal(name, "reject", f"owns {', '.join(arrays)} arrays; this is {kind}"))
                continue
            try:
                loaded.append(self.backend(name))
            except BackendUnavailableError as error:
                refusals.append(Refusal(name, "load", error.reason, error.install))
            except BackendError as error:
                refusals.append(Refusal(name, "load", str(error)))
        return loaded, refusals

    def override(self, plan: Plan, candidates: Sequence[Candidate]) -> Candidate | None:
        """The first choice that a plugin's `rainfusion_choose_backend` makes; a hook that fails is warned of."""
        given = {"plan": plan, "candidates": candidates}
        hooks = self.manager.hook.rainfusion_choose_backend.get_hookimpls()
        for hook in reversed(hooks):  # in pluggy's order; a call through pluggy would end at the first that raises
            try:
                chosen = cast(Any, hook.function)(*(given[name] for name in hook.argnames))
            except FAILURES as error:
                warn_caller(f"rainfusion_choose_backend of {hook.plugin_name} failed: {said(error)}", RainfusionWarning)
                continue
            if isinstance(chosen, Candidate) and chosen in candidates:
                return chosen
            if chosen is not None:
                warn_caller(
                    f"rainfusion_choose_backend of {hook.plugin_name} gave {chosen!r}, which is no candidate",
                    RainfusionWarning,
                )
        return None


_creating = RLock()


def host() -> PluginHost:
    """The host of this process; threads that ask at once get the same one."""
    with _creating:
        return _host()


@cache
def _host() -> PluginHost:
    return PluginHost()


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown distribution"


def _builtin_first(entry: EntryPoint) -> tuple[bool, str]:
    return (_distribution(entry) != "rainfusion", entry.name)
