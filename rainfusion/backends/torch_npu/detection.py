"""Finding the NPUs of a machine without breaking the interpreter.

Importing torch_npu where CANN is missing fails in several ways, leaves half of it loaded, and changes an
environment variable; so it is tried in another process first, and what failed is not tried again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from rainfusion.backends.torch_npu.chips import CHIPS, Chip, chip_of
from rainfusion.core.backend import Device
from rainfusion.core.errors import BackendUnavailableError

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # with 0, importing torch does not import torch_npu
INSTALL_CANN = f"install CANN and source its set_env.sh; without an NPU, set {AUTOLOAD}=0 to use torch on the CPU"
_SECONDS = 120


def devices() -> list[Device]:
    """The NPUs of this machine.

    Raises:
        BackendUnavailableError: what is missing, and what to do.
    """
    npu = torch_npu().npu
    if not npu.is_available():
        raise BackendUnavailableError(
            "torch_npu loads, but sees no NPU", "check the driver (npu-smi info) and ASCEND_RT_VISIBLE_DEVICES"
        )
    cann = getattr(npu.utils, "get_cann_version", str)()  # older ones do not know it
    software = f"CANN {cann or 'of unknown version'}, torch_npu {torch_npu().__version__}"
    return [Device("npu", i, f"{npu.get_device_name(i)}: {chip().name}, {software}") for i in range(npu.device_count())]


@cache
def chip() -> Chip:
    """The generation of this machine's NPUs, which are all of one.

    Raises:
        BackendUnavailableError: one without block-sparse attention.
    """
    soc = torch_npu().npu.get_soc_version()
    found = chip_of(soc)
    if found is None:
        known = ", ".join(f"{c.name} ({c.socs.start} to {c.socs.stop - 1})" for c in CHIPS)
        raise BackendUnavailableError(
            f"the NPU's SoC number is {soc}; block-sparse attention exists on {known}", "use backend='torch' there"
        )
    return found


def torch_npu() -> ModuleType:
    """The module, imported.

    Raises:
        BackendUnavailableError: it does not load.
    """
    failed = "" if _is_loaded() else _why_not_loaded()
    if failed:
        raise BackendUnavailableError(failed, INSTALL_CANN)
    return sys.modules["torch_npu"]


def _is_loaded() -> bool:
    """Whether torch_npu is in this process, whole: torch imports it by itself unless told not to."""
    return hasattr(sys.modules.get("torch_npu"), "__version__") and hasattr(sys.modules.get("torch"), "npu")


@cache
def _why_not_loaded() -> str:
    """Import torch_npu; why that failed, or empty."""
    if not (os.environ.get("ASCEND_HOME_PATH") or [*Path("/dev").glob("davinci*")]):
        return "torch-npu is installed, but there is no CANN (no ASCEND_HOME_PATH) and no NPU (no /dev/davinci*)"
    autoload = os.environ.get(AUTOLOAD)
    try:
        return _why_not_loaded_elsewhere() or _import()
    finally:
        os.environ.pop(AUTOLOAD, None)
        if autoload is not None:
            os.environ[AUTOLOAD] = autoload


def _why_not_loaded_elsewhere() -> str:
    command = [sys.executable, "-c", "import torch_npu"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"importing torch_npu takes more than {_SECONDS} s"
    if done.returncode == 0:
        return ""
    said = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
    return f"torch_npu does not load: {said}"


def _import() -> str:
    try:
        import_module("torch_npu")
    except (Exception, SystemExit) as error:
        return f"torch_npu does not load: {type(error).__name__}: {error}".partition("\n")[0]
    return ""
