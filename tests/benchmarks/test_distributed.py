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

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # as a script finds its neighbours
import distributed_page as page

del sys.path[0]

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


@pytest.mark.distributed
@pytest.mark.slow
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


@pytest.mark.distributed
@pytest.mark.slow
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


@pytest.mark.distributed
@pytest.mark.slow
def test_what_it_had_no_time_for_is_said(tmp_path: Path) -> None:
    ran, record = benchmark(str(SCRIPT), "--seconds", "0", json_file=tmp_path / "record.json")
    assert ran.returncode == 1
    assert all(row["not_measured"] == "0.0 s are over" for row in record["rows"])


# -- the page --------------------------------------------------------------------------------------------


def record(**row: Any) -> dict[str, Any]:
    """A record of two devices: 10 ms of attention on each, at 100 MB a millisecond."""
    size = {"size": "A", "heads": 16, "head_dim": 128, "tokens": 64000, "dtype": "bfloat16", "sparsity": 0.8}
    method = {"ms": 11.0, "computations_ms": 10.0, "transfers_ms": 4.0, "bytes_sent": 400_000_000, "hidden": 0.75}
    method |= {"over_one_device": 1.82, "over_dense_ulysses": 5.0}
    rows = [
        {
            **size,
            "differs": {},
            "one_device": {"one device, dense": 100.0, "one device, sparse": 20.0},
            "methods": {"ulysses": method, "ring": method},
            **row,
        }
    ]
    return {"world": 2, "device": "X", "environment": {"torch": "2.11.0"}, "rows": rows}


def test_more_devices_are_computed_from_what_was_measured() -> None:
    (row,) = record()["rows"]
    whole = 64000 * 16 * 128 * 2
    eight, ring, machines = page.estimates(row, 2)
    assert (eight.devices, eight.method, eight.attention) == (8, "ulysses", 2.5)
    assert eight.exchanged == pytest.approx(4 * whole / 8 * 7 / 8 / 1e8)
    assert eight.ms == eight.attention + eight.exchanged
    assert ring.passed == pytest.approx(2 * whole * 7 / 8 / 1e8)
    assert ring.ms == max(2.5, ring.passed)
    assert (machines.devices, machines.method, machines.attention) == (64, "unified, 8 x 8", 20 / 64)
    assert machines.passed == pytest.approx(2 * whole / 8 * 7 / 8 / 50e6)
    assert [it.method for it in page.estimates({**row, "heads": 4}, 2)] == ["ring"]


def test_the_page_says_what_was_not_equal_and_not_measured() -> None:
    there = record()
    there["rows"].append({"size": "B", "sparsity": 0.9, "not_measured": "90 s are over"})
    measured = page.tables([there])["measured"]
    assert "| A, 16 heads, 64000 tokens | 80% | 2 | ring | 11.0 | 1.82 | 5.00 | 400 | 4.00 | 75% |" in measured
    assert "Not measured: 2 devices, B, 90% (90 s are over)." in measured
    assert "Not equal" not in measured
    told = page.tables([record(differs={"ring": "rank 1: the output"})])["measured"]
    assert "Not equal to one device: 2 devices, A, 80%, ring: rank 1: the output." in told


def test_the_page_is_that_of_its_records() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(page.RECORDS.glob("*.json"))]
    if not records:
        assert text.count("-->\n<!-- end -->") == 2
        assert page.filled(text, page.tables([record()])) != text
        return
    assert page.filled(text, page.tables(records)) == text
