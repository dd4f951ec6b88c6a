"""PluginHost: finds plugins, keeps what they announce, loads a backend when it is used.

Nothing a plugin does wrong reaches the others: each is loaded, asked and probed in its own try, and what
failed stands in the report of `rainfusion devices` with its reason.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from threading import RLock
from typing import Any, cast

import pluggy

from rainfusion.core.backend import Backend, BackendSpec
from rainfusion.core.errors import (
    BackendError,
    BackendUnavailableError,
    DuplicateBackendError,
    RainfusionWarning,
    UnknownBackendError,
    warn_caller,
)
from rainfusion.core.ir import Plan
from rainfusion.core.select import Candidate, Refusal
from rainfusion.plugins import hookspecs

GROUP = "rainfusion"
BUILTIN = "builtin"
# What counts as "it failed": a driver stack that calls sys.exit must not take the program along.
FAILURES = (Exception, SystemExit)
REFERENCE = BackendSpec("reference", "rainfusion.backends.reference.backend:ReferenceBackend")


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
            self.manager.check_pending()  # a misspelt hook is an error, not a plugin that does nothing
            specs = [checked_spec(spec) for spec in self._specs_of(plugin)]
        except FAILURES as error:  # a plugin may fail in any way; it must not take the others along
            self.failures.append(Refusal(entry.name, "load", f"plugin {origin}: {_said(error)}"))
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
        if [a.plugin for a in self._announced.get(name, [])] != ["rainfusion.register"]:
            raise UnknownBackendError(f"backend {name!r} was not announced by rainfusion.register")
        del self._announced[name]
        self._loaded.pop(name, None)

    # -- backends ----------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Every announced backend name."""
        return tuple(self._announced)

    def announced(self, name: str) -> Announced:
        """Who announced a backend.

        Raises:
            UnknownBackendError: nobody did.
            DuplicateBackendError: more than one did.
        """
        claims = self._announced.get(name, []) if isinstance(name, str) else []
        if not claims:
            failed = next((f for f in self.failures if f.backend == name), None)
            hint = f" (plugin {name!r} is out: {failed.reason})" if failed else ""
            raise UnknownBackendError(f"backend {name!r} is not known{hint}; choose one of {', '.join(self.names)}")
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

    def backends(self) -> tuple[list[Backend], list[Refusal]]:
        """Every backend that loads here, and why the others do not."""
        loaded, refusals = [], list(self.failures)
        for name in self.names:
            try:
                loaded.append(self.backend(name))
            except BackendUnavailableError as error:
                refusals.append(Refusal(name, "load", error.reason, error.install))
            except BackendError as error:
                refusals.append(Refusal(name, "load", str(error)))
        return loaded, refusals

    def override(self, plan: Plan, candidates: Sequence[Candidate]) -> Candidate | None:
        """The first choice a plugin's `rainfusion_select` makes; one that fails is reported and passed over."""
        given = {"plan": plan, "candidates": candidates}
        hooks = self.manager.hook.rainfusion_select.get_hookimpls()
        for hook in reversed(hooks):  # in pluggy's order; its own call would end at the first that raises
            try:
                chosen = cast(Any, hook.function)(*(given[name] for name in hook.argnames))
            except FAILURES as error:
                warn_caller(f"rainfusion_select of {hook.plugin_name} failed: {_said(error)}", RainfusionWarning)
                continue
            if isinstance(chosen, Candidate) and chosen in candidates:
                return chosen
            if chosen is not None:
                warn_caller(
                    f"rainfusion_select of {hook.plugin_name} gave {chosen!r}, which is no candidate", RainfusionWarning
                )
        return None


_making = RLock()


def host() -> PluginHost:
    """The host of this process, one however many threads ask first."""
    with _making:
        return _host()


@cache
def _host() -> PluginHost:
    return PluginHost()


_broken: dict[str, str] = {}  # packages whose import failed half-way, and what it said


def load(spec: BackendSpec) -> Backend:
    """Import a spec's target and make the backend.

    Raises:
        BackendUnavailableError: naming what is missing or what failed.
    """
    environ = dict(os.environ)
    try:
        broken = next((name for name in spec.requires if _is_half_imported(name)), None)
        if broken:
            said = _broken.get(broken, "its import failed in this process before")
            raise BackendUnavailableError(f"backend {spec.name!r} needs {broken}: {said}", spec.install)
        missing = [name for name in spec.requires if find_spec(name) is None]
        if missing:
            reason = f"backend {spec.name!r} needs {', '.join(missing)}, not installed"
            raise BackendUnavailableError(reason, spec.install)
        module, _, attribute = spec.target.partition(":")
        made = getattr(import_module(module), attribute)()
    except BackendUnavailableError:
        raise
    except FAILURES as error:  # importing a vendor's stack fails in every way there is
        _restore(environ)
        _broken.update({name: _said(error) for name in spec.requires if _is_half_imported(name)})
        raise BackendUnavailableError(f"backend {spec.name!r} does not load: {_said(error)}", spec.install) from error
    if not isinstance(made, Backend) or getattr(made, "name", None) != spec.name:
        raise BackendUnavailableError(f"{spec.target} is not a Backend with name {spec.name!r}")
    return made


def _is_half_imported(package: str) -> bool:
    """Whether an import of `package` failed and left modules behind; to import it again may end the interpreter."""
    return package not in sys.modules and any(name.startswith(f"{package}.") for name in [*sys.modules])


def _restore(environ: Mapping[str, str]) -> None:
    """Take back what a failed import has done to the environment, which child processes inherit."""
    for key in {*os.environ} - {*environ}:
        del os.environ[key]
    os.environ.update({key: value for key, value in environ.items() if os.environ.get(key) != value})


def checked_spec(spec: Any) -> BackendSpec:
    """The spec itself, if it is well formed; BackendError otherwise."""
    if not isinstance(spec, BackendSpec):
        raise BackendError(f"rainfusion_backends yields {spec!r}; give BackendSpec(name, 'package.module:Class')")
    module, colon, attribute = spec.target.partition(":")
    if not spec.name or not module or not colon or not attribute:
        raise BackendError(f"{spec!r} is incomplete; give a name and a target 'package.module:Class'")
    if not isinstance(spec.revision, int):
        raise BackendError(f"backend {spec.name!r} has revision {spec.revision!r}; give a whole number")
    return spec


def _names(text: str) -> frozenset[str]:
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown distribution"


def _builtin_first(entry: EntryPoint) -> tuple[bool, str]:
    return (_distribution(entry) != "rainfusion", entry.name)


def _said(error: BaseException) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"
