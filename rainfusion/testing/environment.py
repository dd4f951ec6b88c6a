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
    for command in (["lscpu"], ["sysctl", "-n", "machdep.cpu.brand_string"]):
        for line in (_said(command, LC_ALL="C") or "").splitlines():
            label, colon, name = line.partition(":")
            if not colon or label == "Model name":
                return (name if colon else label).strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that rainfusion runs from, ``-dirty`` where the package was changed; None outside one.

    On a machine that has the files without their history, ``RAINFUSION_COMMIT`` says it.
    """
    if given := os.environ.get("RAINFUSION_COMMIT"):
        return given
    # Only if this file is tracked: an environment may lie inside a checkout of something else.
    if _said(["git", "ls-files", "--error-unmatch", __file__]) is None:
        return None
    commit = _said(["git", "describe", "--always", "--exclude=*"])
    changed = _said(["git", "status", "--porcelain", "--untracked-files=no", "--", "."])
    return f"{commit}-dirty" if changed else commit


def _said(command: list[str], **environ: str) -> str | None:
    """What a command prints, run in the package's folder; None where it fails or does not exist."""
    settings: dict[str, Any] = {"cwd": _PACKAGE, "env": {**os.environ, **environ}, "timeout": 30}
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, **settings).stdout.strip()
    return None


def _first_line(file: str) -> str:
    with suppress(OSError):
        return Path(file).read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    return ""


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None
