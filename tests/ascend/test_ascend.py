"""The Ascend backend as far as truth allows without the chip; what is checked and what is not: README.md beside this.

Each part runs in a process and environment of its own: torch with torch_npu needs CANN to be imported at all, and
operators that a test registers stay registered.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import npu_environment as npu
import pytest

from rainfusion.core.precision import FORMATS

INSIDE = npu.HERE / "inside"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@pytest.fixture(scope="module", autouse=True)
def wheel() -> None:
    """The wheel and a compiler are here; CI must have them."""
    reason = npu.missing()
    if reason and os.environ.get("CI"):
        pytest.fail(f"CI needs both: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cann(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for all of CANN."""
    return npu.build_stand_in(tmp_path_factory.mktemp("cann") / "libraries")


@pytest.fixture(scope="module")
def old_cann(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for a CANN that does not have block-sparse attention yet."""
    return npu.build_stand_in(tmp_path_factory.mktemp("old") / "libraries", "WITHOUT_BLOCK_SPARSE_ATTENTION")


def passed(done: CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def mindiesd_library() -> str:
    """MindIE-SD's extension library; CI must have it where there is a wheel for its Python."""
    reason = npu.mindiesd_missing()
    if reason and os.environ.get("CI") and sys.version_info[:2] in npu.MINDIESD_PYTHONS:
        pytest.fail(f"CI needs it: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)
    return str(npu.mindiesd_library())


def test_every_argument_fits_torch_npus_schemas() -> None:
    path = str(INSIDE / "to_torch_npu.py")
    passed(npu.run(sys.executable, *npu.pytest_arguments(path), **npu.environ(TORCH_NPU_SCHEMAS=str(npu.schemas()))))


def test_every_argument_fits_mindiesds_schemas(mindiesd_library: str) -> None:
    path = str(INSIDE / "to_mindiesd.py")
    passed(npu.run(sys.executable, *npu.pytest_arguments(path), **npu.environ(MINDIESD_LIBRARY=mindiesd_library)))


@pytest.mark.parametrize("chip", npu.CHIPS)
def test_mindiesds_own_library_on_the_stand_in_device(chip: str, cann: Path, mindiesd_library: str) -> None:
    arguments = npu.pytest_arguments("-p", "stand_in_device", str(INSIDE / "mindiesd_operators.py"))
    names = {"MINDIESD_LIBRARY": mindiesd_library, "STAND_IN_SOC": npu.CHIPS[chip]}
    passed(npu.run(npu.PYTHON, *arguments, **npu.environ(cann, mindiesd=True, **names)))


@pytest.mark.parametrize("module", ["meta_kernels", "no_round_trip", "dense_rows"])
def test_on_the_stand_in_device(module: str, cann: Path) -> None:
    arguments = npu.pytest_arguments("-p", "stand_in_device", str(INSIDE / f"{module}.py"))
    passed(npu.run(npu.PYTHON, *arguments, **npu.environ(cann)))


def test_mindiesds_own_selection(cann: Path, mindiesd_library: str) -> None:
    arguments = npu.pytest_arguments("-p", "stand_in_device", str(INSIDE / "mindiesd_selection.py"))
    passed(npu.run(npu.PYTHON, *arguments, **npu.environ(cann, mindiesd=True, MINDIESD_LIBRARY=mindiesd_library)))


def test_the_next_operator_serves_where_cann_lacks_one(old_cann: Path) -> None:
    arguments = npu.pytest_arguments("-p", "stand_in_device", str(INSIDE / "old_cann.py"))
    passed(npu.run(npu.PYTHON, *arguments, **npu.environ(old_cann)))


@pytest.mark.parametrize(
    ("chip", "tests"),
    [("A2", ""), ("A3", "test_attend"), ("950", "test_attend")],
)
def test_the_kit_passes_on_the_stand_in_device(chip: str, tests: str, cann: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = npu.kit_arguments(f"--rainfusion-report={report}", "-k", tests)
    passed(npu.run(npu.PYTHON, *arguments, **npu.environ(cann, STAND_IN_SOC=npu.CHIPS[chip])))
    seen = json.loads(report.read_text(encoding="utf-8"))
    assert f"posing as {npu.CHIPS[chip]}: {chip}," in seen["target"]["device_name"]
    assert {test["outcome"] for test in seen["tests"]} == {"passed", "skipped"}
    cases = [(test["outcome"], test["observation"]) for test in seen["tests"] if "observation" in test]
    attended = {case["case"] for outcome, case in cases if outcome == "passed" and case["level"] == "attend"}
    in_8_bits = tuple(FORMATS)  # a case's name begins with its precision; these are declined
    names = {case["case"] for _, case in cases if case["dtype"] in ("float16", "bfloat16")}
    assert attended == {name for name in names if not name.startswith(in_8_bits)}
    assert len(attended) > 100


def status(*libraries: Path, **environment: str) -> dict[str, Any]:
    """What `rainfusion devices` says of this backend."""
    done = npu.run(npu.PYTHON, "-m", "rainfusion.cli", "devices", "--json", **npu.environ(*libraries, **environment))
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in json.loads(done.stdout) if row["backend"] == "torch_npu"]
    return row


def test_devices_without_cann_prints_the_cure() -> None:
    row = status()
    assert (row["status"], row["stage"]) == ("unavailable", "load")
    assert "Failed to load the backend extension: torch_npu" in row["reason"]
    assert "set_env.sh" in row["install"]
    assert f"{AUTOLOAD}=0" in row["install"]


def test_devices_without_cann_where_torch_is_told_not_to_load_it() -> None:
    row = status(**{AUTOLOAD: "0"})
    assert (row["status"], row["stage"]) == ("unavailable", "probe")
    assert "there is no CANN (no ASCEND_HOME_PATH)" in row["reason"]
    assert "set_env.sh" in row["install"]


def test_devices_with_a_cann_that_does_not_load() -> None:
    row = status(**{AUTOLOAD: "0", "ASCEND_HOME_PATH": "/nowhere"})
    assert "torch_npu does not load: ImportError" in row["reason"]


def test_devices_with_cann_and_no_npu(cann: Path) -> None:
    row = status(cann, STAND_IN_DEVICES="0")
    assert (row["status"], row["stage"]) == ("unavailable", "probe")
    assert "sees no NPU" in row["reason"]
    assert "npu-smi" in row["install"]


def test_devices_lists_npus(cann: Path) -> None:
    row = status(cann)
    assert (row["status"], row["device"]) == ("ready", "npu:0")
    assert row["name"].startswith("Ascend910B3: A2,")


USE_WHAT_IS_THERE = """
import os
import numpy as np
import rainfusion
from rainfusion.plugins.manager import host

q = np.random.default_rng(0).standard_normal((1, 1, 256, 64), dtype="float32")
for _ in range(2):
    rainfusion.attention(q, q, q, sparsity=0.5)
    try:
        host().backend("torch_npu").devices()
    except rainfusion.core.errors.BackendUnavailableError as error:
        print(error.reason)
print(os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))
"""


@pytest.mark.parametrize("environment", [{}, {AUTOLOAD: "0", "ASCEND_HOME_PATH": "/nowhere"}], ids=["autoload", "not"])
def test_a_failed_import_leaves_the_interpreter_usable(environment: dict[str, str]) -> None:
    done = npu.run(npu.PYTHON, "-c", USE_WHAT_IS_THERE, **npu.environ(**environment))
    passed(done)  # to import torch twice, where it fails, ends in a segmentation fault
    first, again, switch = done.stdout.splitlines()
    assert "torch_npu" in first
    assert again == first
    assert switch == environment.get(AUTOLOAD, "None")
