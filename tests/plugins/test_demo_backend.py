"""The demo backend: a third party with nothing but rainfusion's public names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import rainfusion

DEMO = Path(__file__).parent.parent / "demo_backend"
ATTENTION = """
    import numpy as np
    import rainfusion
    from acme_rainfusion.backend import AcmeArray

    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 300, 64)).astype("float32").view(AcmeArray)
    problem = rainfusion.AttentionProblem.from_tensors(q, k, v)
    half = rainfusion.TopK(0.5)
"""


def test_it_stays_small_enough_to_copy() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in DEMO.rglob("*.py")) <= 90


def test_it_is_found_by_its_entry_point(demo: Any) -> None:
    rows = demo.ask("import rainfusion\nanswer = [[r.backend, r.device, r.status] for r in rainfusion.devices()]")
    assert ["acme", "acme:0", "ready"] in rows


def test_its_arrays_choose_it(demo: Any) -> None:
    code = """
        out = rainfusion.attention(q, k, v, policy=half)
        choice = rainfusion.choose(rainfusion.plan(problem, policy=half), like=q)
        answer = [choice.candidate.backend.name, type(out).__name__]
    """
    assert demo.ask(_lines(ATTENTION, code)) == ["acme", "AcmeArray"]


def test_its_kernel_runs_and_definitions_fill_the_gaps(demo: Any) -> None:
    code = """
        plan = rainfusion.plan(problem, policy=half, omitted="summary")
        answer = str(rainfusion.lower(plan, device="acme:0")).splitlines()[1:]
    """
    steps = [line.split() for line in demo.ask(_lines(ATTENTION, code))]
    assert steps == [
        *[["definition", op] for op in ("block_mean", "block_mean", "block_mean", "block_score", "select")],
        ["acme", "attend"],
        ["definition", "attend_means"],
        ["definition", "merge"],
    ]


def test_it_imports_public_names_alone() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (DEMO / "acme_rainfusion").glob("*.py"))
    assert {*re.findall(r"(?:from|import) (rainfusion[\w.]*)", sources)} == {"rainfusion"}
    for names in re.findall(r"from rainfusion import (.*)", sources):
        assert {*names.split(", ")} <= {*rainfusion.__all__}


def test_it_computes_what_the_reference_does(demo: Any) -> None:
    code = """
        parts = (rainfusion.Text(9), rainfusion.Grid(3, 8, 12, sink=None), rainfusion.Text(3))
        settings = {"parts": parts, "block": 32, "sparsity": 0.2, "omitted": "summary", "kv_lengths": np.array([298])}
        out = rainfusion.attention(q, k, v, **settings)
        plain = [np.asarray(x) for x in (q, k, v)]
        expected = rainfusion.attention(*plain, backend="reference", **settings)
        answer = float(abs(np.asarray(out) - expected).max())
    """
    assert demo.ask(_lines(ATTENTION, code)) < 1e-5


def test_strict_lowering_says_what_it_has_no_kernel_for(demo: Any) -> None:
    code = """
        plan = rainfusion.plan(problem, policy=half)
        try:
            rainfusion.lower(plan, device="acme:0", strict=True)
        except rainfusion.core.errors.LoweringError as error:
            answer = str(error)
    """
    assert "acme on acme:0 has no kernel for `%qb = block_mean" in demo.ask(_lines(ATTENTION, code))


def test_it_passes_the_kit_with_an_empty_subclass(demo: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    plain = ("-p", "no:cacheprovider", "-q", "-rfE")
    done = demo.start("-m", "pytest", *plain, f"--rainfusion-report={report}", cwd=DEMO, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(report.read_text(encoding="utf-8"))
    assert (found["target"]["backend"], found["target"]["device"]) == ("acme", "acme:0")
    assert {test["outcome"] for test in found["tests"]} == {"passed", "skipped"}
    reasons = {test["reason"].partition(": ")[2] for test in found["tests"] if test["outcome"] == "skipped"}
    assert "no dtype bfloat16 (it has float16, float32)" in reasons


def _lines(*parts: str) -> str:
    return "\n".join(map(dedent, parts))
