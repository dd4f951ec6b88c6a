"""Recording a target on this machine, as ``python -m rainfusion.matrix.record`` does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = """
[chips.here]
vendor = "Acme"
name = "this machine"
architecture = "any"
recognise = ["*"]

[chips.elsewhere]
vendor = "Acme"
name = "another machine"
architecture = "any"
recognise = ["No such processor"]

[chips.interpreter]
vendor = "Acme"
name = "an interpreter"
architecture = "any"
evidence = "emulated"
"""
TARGET = """
[[target]]
backend = "reference"
chip = "{chip}"
device = "cpu"
runtime = "NumPy"
dtypes = ["float16", "bfloat16", "float32", "float64"]
{more}
"""
FEW = "-k ragged_row-bf16"
HEAVY = "torch,triton,torch_npu,openvino"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    more = {"interpreter": "environ = { RAINFUSION_COMMIT = 'said-by-the-target' }"}
    entries = (TARGET.format(chip=chip, more=more.get(chip, "")) for chip in ("here", "elsewhere", "interpreter"))
    (tmp_path / "targets.toml").write_text(TARGETS + "".join(entries))
    return tmp_path


def record(folder: Path, target: str, commit: str = "abc") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rainfusion.matrix.record", target, "--folder", str(folder)],
        env={**os.environ, "PYTEST_ADDOPTS": FEW, "RAINFUSION_DISABLED_PLUGINS": HEAVY, "RAINFUSION_COMMIT": commit},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_target_is_recorded(folder: Path) -> None:
    done = record(folder, "reference-here")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((folder / "results" / "reference-here.json").read_text())
    (suite,) = document["suites"]
    assert (suite["backend"], suite["revision"], suite["stand_in"]) == ("reference", 1, "")
    assert suite["outcomes"] == {"passed": 3}


def test_a_stand_in_is_recorded_under_its_name_and_in_its_environment(folder: Path) -> None:
    assert record(folder, "reference-interpreter").returncode == 0
    document = json.loads((folder / "results" / "reference-interpreter.json").read_text())
    assert document["suites"][0]["stand_in"] == "an interpreter"
    assert document["environment"]["commit"] == "said-by-the-target"


def test_known_failures_are_passed_on_and_a_stale_one_fails(folder: Path) -> None:
    (folder / "xfails").mkdir()
    known = '[[xfail]]\ntest = "test_attend[ragged_row-bf16]"\nreason = "x"\nissue = "y"\n'
    (folder / "xfails" / "reference.toml").write_text(known)
    assert record(folder, "reference-here").returncode == 1
    (suite,) = json.loads((folder / "results" / "reference-here.json").read_text())["suites"]
    assert suite["outcomes"] == {"passed": 2, "failed": 1}


def test_code_that_no_commit_has_is_not_recorded(folder: Path) -> None:
    done = record(folder, "reference-here", commit="abc-dirty")
    assert done.returncode == 2
    assert "made of code that no commit has (abc-dirty); commit it first" in done.stderr
    assert not (folder / "results").exists()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "reference-elsewhere",
            "error: this is not reference-elsewhere, nothing was written: the machine calls itself",
        ),
        ("reference-moon", "error: 'reference-moon' is no target to record; list it in targets.toml, or choose one of"),
    ],
)
def test_another_machine_or_target_is_refused(folder: Path, target: str, said: str) -> None:
    done = record(folder, target)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (folder / "results").exists()
