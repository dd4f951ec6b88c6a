"""What devices are here: one status per backend and device, each backend probed so that none can break it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint
from typing import Any

from rainfusion.core import choice, faults
from rainfusion.core.backend import Backend, BackendSpec, Capabilities, Device
from rainfusion.core.checks import as_flag, shown
from rainfusion.core.choice import Refusal
from rainfusion.core.errors import BackendError, BackendUnavailableError, readable, said
from rainfusion.plugins import apart, installed
from rainfusion.plugins.answers import Answer
from rainfusion.plugins.loading import checked_spec
from rainfusion.plugins.manager import (
    REGISTERED,
    Announced,
    Announcement,
    PluginHost,
    announcement,
    host,
    host_so_far,
)

READY, UNAVAILABLE = "ready", "unavailable"


@dataclass(frozen=True)
class DeviceStatus:
    """One line of `rainfusion devices`.

    Attributes:
        status: ``ready`` or ``unavailable``; for the latter `stage` (disabled, load, probe, choose, lower, run),
            `reason` and `install` say why and what to do.
    """

    backend: str
    status: str
    device: str = ""
    name: str = ""
    stage: str = ""
    reason: str = ""
    install: str = ""

    def __post_init__(self) -> None:
        for field in ("backend", "status", "device", "name", "stage", "reason", "install"):
            object.__setattr__(self, field, readable(getattr(self, field)))


def devices(*, isolate: bool | None = None) -> list[DeviceStatus]:
    """Every backend and device, and why those that are missing are missing.

    What backends and plugins of this process have done wrong in calls is listed as well.

    Args:
        isolate: import no other package's plugin in this process, and probe its backends, and those that require
            something, each in a process of its own. None does so only for backends whose spec asks for it; False for
            none. What `rainfusion.register` announced is probed here in any case.

    Raises:
        BackendError: `isolate` is neither.
    """
    isolate = None if isolate is None else as_flag(isolate, "isolate", BackendError)
    plugins = host_apart() if isolate else host()
    rows = {name: _here_or_apart(plugins, name, isolate) for name in plugins.names}
    questions = {name: row for name, row in rows.items() if isinstance(row, tuple)}
    for name, answer in zip(questions, apart.ask_all([*questions.values()]), strict=True):
        install = plugins.announced(name).spec.install
        try:
            rows[name] = [DeviceStatus(**row) for row in answer()]
        except BackendError as error:
            rows[name] = [_out(name, "probe", str(error), install)]
    found = [status for statuses in rows.values() for status in statuses if isinstance(status, DeviceStatus)]
    wrong: list[Refusal] = [*plugins.failures, *faults.noted()]
    return found + [_out(refusal.backend, refusal.stage, refusal.reason, refusal.install) for refusal in wrong]


def host_apart() -> PluginHost:
    """A host that has asked other packages' plugins for their backends in processes of their own.

    It knows what `rainfusion.register` announced in this process, too.
    """
    entries, broken = installed.entries()
    others = [entry for entry in entries if not installed.is_builtin(entry) and PluginHost.enables(entry)]
    answers = zip(others, apart.ask_all([(installed.origin(entry),) for entry in others]), strict=True)
    told = {installed.origin(entry): Answer(answer, here=True) for entry, answer in answers}

    def announce(entry: EntryPoint) -> Answer[Announcement]:
        def given() -> Announcement:
            rows = told[installed.origin(entry)].within(0)
            if "failure" in rows:
                raise _AsSaid(rows["failure"])
            return Announcement(None, tuple(checked_spec(BackendSpec(**row)) for row in rows["specs"]))

        return Answer(given, here=True)

    made = PluginHost(found=entries, announce=announce, broken=broken)
    here = host_so_far()
    if here is not None:
        made.adopt(here)
    return made


class _AsSaid(BackendError):
    """What went wrong in another process, in the words from there."""


def _here_or_apart(plugins: PluginHost, name: str, isolate: bool | None) -> list[DeviceStatus] | tuple[str, str]:
    """The rows of a backend, or the question to be put to a process of its own."""
    try:
        announced = plugins.announced(name)
    except BackendError as error:
        return [_out(name, "load", str(error))]
    if _is_apart(announced, isolate):
        return announced.plugin, name
    return probe(plugins, name)


def _is_apart(announced: Announced, isolate: bool | None) -> bool:
    if announced.plugin == REGISTERED or isolate is False:
        return False
    return announced.spec.isolate or bool(isolate and (announced.spec.requires or not announced.trusted))


def probe(plugins: PluginHost, name: str) -> list[DeviceStatus]:
    """Load a backend and ask it for its devices, in this process; one of another package answers within a limit."""
    announced = plugins.announced(name)
    answer = Answer(lambda: _probed(plugins, name), here=announced.trusted)
    try:
        return answer.within(apart.seconds())
    except BackendError as error:
        return [_out(name, "probe", str(error), announced.spec.install)]


def _probed(plugins: PluginHost, name: str) -> list[DeviceStatus]:
    install = plugins.announced(name).spec.install
    try:
        backend = plugins.backend(name)
    except BackendUnavailableError as error:
        return [_out(name, "load", error.reason, error.install)]
    try:
        devices = choice.devices_of(backend)
        wrong = [reason for device in devices if (reason := _breach(backend, device))]
    except BackendUnavailableError as error:
        return [_out(name, "probe", error.reason, error.install or install)]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [_out(name, "probe", said(error), install)]
    if wrong:
        return [_out(name, "choose", wrong[0], install)]
    found = [DeviceStatus(name, READY, str(device), device.name) for device in devices]
    return found or [_out(name, "probe", "no device of this kind here", install)]


def _breach(backend: Backend, device: Device) -> str:
    """What is wrong with the answers of a backend about a small plan; empty for nothing."""
    capabilities = backend.capabilities(device)
    if not isinstance(capabilities, Capabilities):
        return f"capabilities() gave {shown(capabilities)}; give rainfusion.Capabilities(...)"
    return choice.breach(backend, _small_plan(), device)


def _small_plan() -> Any:
    from rainfusion.core.planner import plan
    from rainfusion.core.policies import TopK
    from rainfusion.core.problem import AttentionProblem

    return plan(AttentionProblem(1, 1, 512, 512, 64), policy=TopK(0.5))


def _out(name: str, stage: str, reason: str, install: str = "") -> DeviceStatus:
    return DeviceStatus(name, UNAVAILABLE, stage=stage, reason=reason, install=install)


# -- in a process apart --------------------------------------------------------------------------------


def announced_by(plugin: str) -> dict[str, Any]:
    """The specs that a plugin announces, or why it does not."""
    try:
        specs = announcement(_entry(plugin)).specs
    except BaseException as error:
        return {"failure": said(error)}
    return {"specs": [asdict(spec) for spec in specs]}


def devices_of(plugin: str, backend: str) -> list[dict[str, str]]:
    """The rows of one backend, with no other package's plugin loaded than the one that announces it."""
    found: Iterable[EntryPoint] = [] if plugin == installed.OURS else [_entry(plugin)]
    plugins = PluginHost({}, found)
    plugins.settle(apart.seconds())
    return [asdict(status) for status in probe(plugins, backend)]


def _entry(plugin: str) -> EntryPoint:
    entries: Sequence[EntryPoint] = installed.entries()[0]
    return next(entry for entry in entries if installed.origin(entry) == plugin)
