"""Recording a target on this machine, as ``python -m hw_matrix record`` does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
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
        [sys.executable, "-m", "hw_matrix", "record", target, "--folder", str(folder)],
        env={**os.environ, "PYTEST_ADDOPTS": FEW, "RAINFUSION_DISABLED_PLUGINS": HEAVY, "RAINFUSION_COMMIT": commit},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_target_is_recorded(folder: Path) -> None:
    done = record(folder, "reference-here")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((folder / "results" / "reference-here.json").read_text())
    assert (document["target"]["backend"], document["target"]["stand_in"]) == ("reference", "")
    assert [test["outcome"] for test in document["tests"]] == ["passed"] * 3


def test_a_stand_in_is_recorded_under_its_name_and_in_its_environment(folder: Path) -> None:
    assert record(folder, "reference-interpreter").returncode == 0
    document = json.loads((folder / "results" / "reference-interpreter.json").read_text())
    assert document["target"]["stand_in"] == "an interpreter"
    assert document["environment"]["commit"] == "said-by-the-target"


OWN = """
import pytest
from rainfusion.testing import ConformanceSuite


class TestKit(ConformanceSuite):
    @pytest.mark.xfail(reason="x (y#1)", strict=True)
    def test_attend(self, target, case, note):
        super().test_attend(target, case, note)
"""


def test_a_suite_of_the_folders_own_is_run(folder: Path) -> None:
    (folder / "test_kit.py").write_text(OWN)
    assert record(folder, "reference-here").returncode == 1
    tests = json.loads((folder / "results" / "reference-here.json").read_text())["tests"]
    assert sorted(test["outcome"] for test in tests) == ["failed", "passed", "passed"]
    assert "XPASS(strict)" in str(tests)


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
