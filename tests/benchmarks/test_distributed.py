"""The benchmark of several devices: it runs, counts what travels, and fails where a method is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "distributed.py"
WRONG = """
import runpy, sys
import rainfusion.distributed as rd
right = rd.attention
def wrong(*args, **kind):
    found = right(*args, **kind)
    if isinstance(found, tuple) and kind["method"] == "gather":
        found[0][0, 1, 2] += 1
        found[1][0, 1, 2] += 0.01
        found[2].blocks[0, 0, 0, 0] ^= True
    return found
rd.attention = wrong
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def benchmark(*command: str, world: int = 2, json_file: Path) -> tuple[subprocess.CompletedProcess[str], Any]:
    """What it prints, and its record."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    ran = subprocess.run(
        [*torchrun, *command, "--tiny", "--rounds", "1", "--json", str(json_file)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        env=dict(os.environ, PYTHONPATH=str(SCRIPT.parents[1]), CUDA_VISIBLE_DEVICES=""),
    )
    assert json_file.exists(), ran.stderr
    return ran, json.loads(json_file.read_text())


def test_every_method_is_measured_and_its_bytes_are_counted(tmp_path: Path) -> None:
    ran, record = benchmark(str(SCRIPT), json_file=tmp_path / "record.json")
    assert ran.returncode == 0, ran.stderr
    assert record["world"] == 2
    assert [(row["size"], row["sparsity"]) for row in record["rows"]] == [
        (name, share) for share in (0.8, 0.9) for name in ("tiny", "tiny, bfloat16")
    ]
    for row in record["rows"]:
        assert row["differs"] == {}
        shard = row["tokens"] // 2 * row["heads"] * row["head_dim"] * (4 if row["dtype"] == "float32" else 2)
        means = row["tokens"] // 2 // 16 * row["heads"] * row["head_dim"] * 4 * 2
        sent = {name: method["bytes_sent"] for name, method in row["methods"].items()}
        # Half of the heads of q, k, v and the output; or k and v, and the means of q and k.
        exchanged, gathered = 2 * shard, 2 * shard + means
        assert sent["ulysses, dense"] == sent["ulysses"] == exchanged
        assert sent["gather"] == gathered
        assert sent["ring"] == gathered + 2 * row["heads"]  # which heads of which shard a rank reads, a byte each
        for method in row["methods"].values():
            assert min(method[name] for name in ("ms", "computations_ms", "transfers_ms")) > 0


def test_a_wrong_method_is_named_and_the_status_says_so(tmp_path: Path) -> None:
    command = tmp_path / "wrong.py"
    command.write_text(WRONG)
    ran, record = benchmark(str(command), str(SCRIPT), "--sparsity", "0.8", json_file=tmp_path / "record.json")
    assert ran.returncode == 1
    for row in record["rows"]:
        assert [*row["differs"]] == ["gather"]
        for part in ("1 of", "block pairs of the mask differ", "the output differs by", "the log-sum-exp differs by"):
            assert part in row["differs"]["gather"]
    assert "DIFFERS FROM ONE DEVICE: gather: rank 0: 1 of" in ran.stdout


def test_what_it_had_no_time_for_is_said(tmp_path: Path) -> None:
    ran, record = benchmark(str(SCRIPT), "--seconds", "0", json_file=tmp_path / "record.json")
    assert ran.returncode == 1
    assert all(row["not_measured"] == "0.0 s are over" for row in record["rows"])
