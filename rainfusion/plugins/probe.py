"""What devices are here: one status per backend and device, each backend probed so that none can break it.

As a program (``python -m rainfusion.plugins.probe NAME``) it probes one backend and prints JSON, so that
a stack that ends the interpreter ends only that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from rainfusion.core.checks import as_flag
from rainfusion.core.errors import BackendError, BackendUnavailableError
from rainfusion.plugins.loading import FAILURES
from rainfusion.plugins.manager import PluginHost, host

READY, UNAVAILABLE = "ready", "unavailable"
_SECONDS = 120
_ANSWER = "rainfusion devices: "  # marks the line of the answer among all that a driver stack prints


@dataclass(frozen=True)
class DeviceStatus:
    """One line of `rainfusion devices`.

    Attributes:
        status: ``ready`` or ``unavailable``; for the latter `stage` (disabled, load, probe), `reason`
            and `install` say why and what to do.
    """

    backend: str
    status: str
    device: str = ""
    name: str = ""
    stage: str = ""
    reason: str = ""
    install: str = ""


def devices(*, isolate: bool | None = None) -> list[DeviceStatus]:
    """Every backend and device, and why those that are missing are missing.

    Args:
        isolate: probe each backend that requires something, or whose spec asks for it, in a process of its
            own; None does so only where the spec asks for it.

    Raises:
        BackendError: `isolate` is neither.
    """
    isolate = None if isolate is None else as_flag(isolate, "isolate", BackendError)
    plugins = host()
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda name: _statuses(plugins, name, isolate), plugins.names)
        rows = [status for statuses in found for status in statuses]
    rows += [DeviceStatus(f.backend, UNAVAILABLE, "", "", f.stage, f.reason, f.install) for f in plugins.failures]
    return rows


def _statuses(plugins: PluginHost, name: str, isolate: bool | None) -> Iterable[DeviceStatus]:
    try:
        announced = plugins.announced(name)
    except BackendError as error:
        return [DeviceStatus(name, UNAVAILABLE, stage="load", reason=str(error))]
    spec = announced.spec
    apart = spec.isolate if isolate is None else isolate and (spec.isolate or bool(spec.requires))
    announced_here_only = announced.plugin == "rainfusion.register"
    return _probe_apart(name) if apart and not announced_here_only else probe(plugins, name)


def probe(plugins: PluginHost, name: str) -> list[DeviceStatus]:
    """Load a backend and ask it for its devices, in this process."""
    install = plugins.announced(name).spec.install
    try:
        backend = plugins.backend(name)
    except BackendUnavailableError as error:
        return [DeviceStatus(name, UNAVAILABLE, stage="load", reason=error.reason, install=error.install)]
    try:
        found = [DeviceStatus(name, READY, str(device), device.name) for device in backend.devices()]
    except BackendUnavailableError as error:
        how = error.install or install
        return [DeviceStatus(name, UNAVAILABLE, stage="probe", reason=error.reason, install=how)]
    except FAILURES as error:
        reason = f"{type(error).__name__}: {error}"
        return [DeviceStatus(name, UNAVAILABLE, stage="probe", reason=reason, install=install)]
    nothing = DeviceStatus(name, UNAVAILABLE, stage="probe", reason="no device of this kind here", install=install)
    return found or [nothing]


def _probe_apart(name: str) -> list[DeviceStatus]:
    command = [sys.executable, "-m", "rainfusion.plugins.probe", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [DeviceStatus(name, UNAVAILABLE, stage="probe", reason=f"no answer within {_SECONDS} s")]
    try:
        answer = next(line for line in done.stdout.splitlines() if line.startswith(_ANSWER))
        return [DeviceStatus(**row) for row in json.loads(answer.removeprefix(_ANSWER))]
    except (StopIteration, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        reason = f"the probing process ended with status {done.returncode}: {last}"
        return [DeviceStatus(name, UNAVAILABLE, stage="probe", reason=reason)]


if __name__ == "__main__":
    found_here = json.dumps([asdict(status) for status in probe(host(), sys.argv[1])])
    print(f"\n{_ANSWER}{found_here}", flush=True)
