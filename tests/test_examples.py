"""The examples run with ``--tiny``, print their report and write what they say."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from rainfusion.integrations.diffusers import adapter

EXAMPLES = Path(__file__).parent.parent / "examples"
# Sparse and dense attention calls of 4 steps, the first of which is dense, and the files that are written.
EXPECTED = {
    "wan_text_to_video": (18, 6, "wan_text_to_video.gif"),  # 3 layers, 2 contexts
    "wan_image_to_video": (18, 6, "wan_image_to_video.gif"),
    "flux": (9, 3, "flux.png"),  # 3 layers, 1 context
    "qwen_image_edit": (12, 4, "qwen_image_edit.png"),  # 2 layers, 2 contexts
    "own_model": (4, 0, "own_model_density.png"),  # 4 layers, one forward
}
SHOWN = "wan_text_to_video"  # its report is on the page


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"tiny", "two_devices", *EXPECTED}


@pytest.mark.parametrize("name", EXPECTED)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapter, "_ADAPTERS", adapter.known()[0])  # what an example registers ends with it
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    sparse, dense, written = EXPECTED[name]
    kinds = f"{sparse} sparse, {dense} dense" if dense else f"{sparse} sparse"
    assert re.match(rf"{sparse + dense} attention calls: {kinds}; density 0\.\d+", printed)
    if name == SHOWN:
        page = (EXAMPLES.parent / "docs" / "diffusers.md").read_text(encoding="utf-8")
        assert "\n".join(line.rstrip() for line in printed.splitlines()) in page
    assert {path.name for path in tmp_path.iterdir()} == {written, f"{name}_density.png"}
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())


@pytest.mark.distributed
def test_the_example_of_two_devices_by_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "two_devices.py"), "--tiny"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    page = (EXAMPLES.parent / "docs" / "several_devices.md").read_text(encoding="utf-8")
    lines = ran.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["ulysses", "gather", "ring"]
    for line in lines:
        told, error = re.split(r", \d+ ms, largest difference ", line)
        assert told in page
        assert float(error) < 2e-6
