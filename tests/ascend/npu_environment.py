"""The second environment, with the torch_npu wheel, and the stand-ins built for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
VENV = ROOT / ".venv-npu"
PYTHON = VENV / "bin" / "python"
MINDIESD = VENV / "mindiesd"  # MindIE-SD and what it imports, apart: tests run with it and without
MINDIESD_PYTHONS = ((3, 11), (3, 12))  # that MindIE-SD 3.1.0 has wheels for
STAND_IN = HERE / "stand_in"
CHIPS = {"A2": "Ascend910B3", "A3": "Ascend910_9391", "950": "Ascend950PR_9589"}


def missing() -> str:
    """Why there is no wheel or no compiler here; empty where there are both."""
    refused = VENV / "missing"
    if refused.exists():
        return f"the torch_npu wheel cannot be had here: {refused.read_text().strip()} (`make clean` tries again)"
    if not (VENV / "ready").exists():
        return "no environment with the torch_npu wheel; `make .venv-npu/ready` makes it"
    tools = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    return f"no {', '.join(tools)} to build the stand-ins with" if tools else ""


def mindiesd_missing() -> str:
    """Why MindIE-SD is not here; empty where it is."""
    refused = VENV / "missing-mindiesd"
    if refused.exists():
        return f"MindIE-SD cannot be had here: {refused.read_text().strip()} (`make clean` tries again)"
    return "" if MINDIESD.is_dir() else "MindIE-SD is not in .venv-npu; `make clean .venv-npu/ready` brings it"


def mindiesd_library() -> Path:
    """MindIE-SD's extension library for torch 2.13, which holds the schemas of its operators."""
    return MINDIESD / "mindiesd" / "plugin" / "torch213" / "libPTAExtensionOPS.so"


def site_packages() -> Path:
    """Where the wheel is installed."""
    (found,) = (VENV / "lib").glob("python*/site-packages")
    return found


def schemas() -> Path:
    """The wheel's own list of its operators."""
    return site_packages() / "torch_npu" / "csrc" / "aten" / "npu_native_functions_by_codegen.yaml"


def build_stand_in(folder: Path, *defines: str) -> Path:
    """Compile the stand-ins; see stand_in/build.py."""
    command = [sys.executable, str(STAND_IN / "build.py"), str(site_packages()), str(folder), *defines]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def environ(libraries: Path | None = None, *, mindiesd: bool = False, **more: str) -> dict[str, str]:
    """The environment of a process; `libraries` are the stand-ins it finds in place of CANN."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAINFUSION", "PYTEST", "ASCEND"))}
    # The stand-in device has no queue: an operator is done when its call returns.
    here = {"LD_LIBRARY_PATH": str(libraries), "TASK_QUEUE_ENABLE": "0"} if libraries else {}
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # matrices are small
    path = os.pathsep.join(map(str, [STAND_IN, *([MINDIESD] if mindiesd else [])]))
    return {**kept, **one_thread, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **here, **more}


def run(python: str | Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python outside the repository, so that what is installed is what is tested."""
    return subprocess.run(
        [str(python), *arguments],
        env=environment,
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def pytest_arguments(*arguments: str) -> tuple[str, ...]:
    """Of a pytest that does not see this one's configuration."""
    plain = ("-c", os.devnull, "--rootdir", str(HERE), "--noconftest", "-p", "no:cacheprovider", "-q", "-rfE")
    return ("-m", "pytest", *plain, *arguments)


def kit_arguments(*arguments: str) -> tuple[str, ...]:
    """Of the conformance kit on the stand-in device."""
    return pytest_arguments(
        *("-p", "stand_in_device", "-p", "rainfusion.testing.pytest_plugin", "--pyargs", "rainfusion.testing"),
        *("--rainfusion-backend", "torch_npu", *arguments),
    )
