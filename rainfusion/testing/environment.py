"""Where and when a report was made: commit, versions, processor, drivers. Names no folder and no user."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[1]
_VERSIONS = ("rainfusion", "numpy", "torch", "triton", "torch-npu", "openvino", "array-api-compat", "pytest")
_DRIVERS = {
    "nvidia": "/proc/driver/nvidia/version",
    "amdgpu": "/sys/module/amdgpu/version",
    "ascend": "/usr/local/Ascend/driver/version.info",
}


def environment() -> dict[str, Any]:
    """Where and when: commit, date, platform, processor, drivers, versions; None for what is not there."""
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "drivers": {name: said for name, file in _DRIVERS.items() if (said := _first_line(file))},
        "python": platform.python_version(),
        **{name: _version(name) for name in _VERSIONS},
    }


def cpu_name() -> str:
    """What this machine's processor calls itself; its architecture where it does not say."""
    names = [line.partition(":")[2] for line in _said("lscpu").splitlines() if line.startswith("Model name:")]
    names += [_said("sysctl", "-n", "machdep.cpu.brand_string"), platform.processor(), platform.machine()]
    return next(name.strip() for name in names if name.strip())


def _commit() -> str | None:
    """The commit of the checkout that rainfusion runs from, ``-dirty`` where the package was changed; None outside one.

    On a machine that has the files without their history, ``RAINFUSION_COMMIT`` says it.
    """
    if given := os.environ.get("RAINFUSION_COMMIT"):
        return given
    # Only if this file is tracked: an environment may lie inside a checkout of something else.
    if not _said("git", "ls-files", "--error-unmatch", __file__):
        return None
    commit = _said("git", "describe", "--always", "--exclude=*")
    changed = _said("git", "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}-dirty" if changed else commit or None


def _said(*command: str) -> str:
    """What a command prints, run in the package's folder; empty where it fails or does not exist."""
    environ = {**os.environ, "LC_ALL": "C"}
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(
            command, cwd=_PACKAGE, env=environ, stderr=subprocess.DEVNULL, text=True, timeout=30
        ).strip()
    return ""


def _first_line(file: str) -> str:
    with suppress(OSError):
        return Path(file).read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    return ""


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None
