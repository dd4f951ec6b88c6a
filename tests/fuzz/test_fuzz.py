"""A small run of the fuzzer, and that it would find what it is for."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import rainfusion
from rainfusion.core import passes, planner
from tests.fuzz import run as fuzz_run
from tests.fuzz.__main__ import main
from tests.fuzz.laws import Subject, broken_laws
from tests.fuzz.oracle import Oracle
from tests.fuzz.problems import SEEDS_A_KIND, draw, draw_for
from tests.fuzz.run import State, failures_of, is_bad, steps
from tests.fuzz.workers import Worker

HERE = ("reference", "torch")
# Each of these found a fault once; `python -m tests.fuzz --seed N` shows it.
FOUND = (1, 7, 135, 201759)


@pytest.mark.parametrize("backends", [HERE, ("openvino",)], ids=["torch", "openvino"])
def test_a_small_run_finds_nothing(backends):
    seeds = range(40 if backends == HERE else 12)
    assert [failure for seed in seeds for failure in failures_of(seed, backends)] == []


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_found_stays_fixed(seed):
    assert failures_of(seed, HERE) == []


def test_one_seed_is_one_problem():
    assert str(draw(12)) == str(draw(12)) != str(draw(13))
    for name, x in draw(12).tensors.items():
        np.testing.assert_array_equal(x, draw(12).tensors[name])


def test_problems_say_everything_there_is():
    problems = [draw(seed) for seed in range(600)]
    for name in ("omitted", "order", "tensor_layout", "dtype", "poison", "strides", "values", "kind"):
        assert len({getattr(p, name) for p in problems}) == {"dtype": 4, "poison": 4, "strides": 6, "values": 7}.get(
            name, 2
        )
    assert {(p.precision, p.rotate) for p in problems} == {
        (None, False),
        *((precision, rotate) for precision in ("int8", "fp8") for rotate in (True, False)),
    }
    assert {p.choice.kind for p in problems} == {"topk", "paper", "topp", "hybrid", "quotas", "mask"}
    assert {part.kind for p in problems for part in p.parts} == {"grid", "text", "tokens"}
    assert len({part.sinks for p in problems for part in p.parts}) > 8
    assert any(p.block[0] != p.block[1] for p in problems)
    assert any(p.q_len != p.kv_len for p in problems)
    assert any(p.heads != p.kv_heads for p in problems)


def broken_in(monkeypatch, change):
    """What the fuzzer finds in a few problems where planning goes wrong."""
    for name in ("select_blocks", "quantised"):
        original = getattr(passes, name)
        monkeypatch.setattr(passes, name, lambda *args, _of=original, **said: change(_of(*args, **said)))
    _forget()
    subjects = [Subject(draw(seed)) for seed in range(900, 940) if not is_bad(seed)]
    found = {message for subject in subjects for _, message in broken_laws(subject, ("reference",))}
    _forget()
    return found


def _forget():
    """Let no plan of before be taken up again."""
    planner._plan.cache_clear()
    rainfusion.cache.clear()


def changed(kind, **fields):
    """A change of every operation of a kind."""

    def change(plan):
        values = {name: value(plan) if callable(value) else value for name, value in fields.items()}
        ops = tuple(dataclasses.replace(op, **values) if isinstance(op, kind) else op for op in plan.ops)
        return dataclasses.replace(plan, ops=ops)

    return change


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (changed(rainfusion.ops.Attend, scale=lambda plan: plan.problem.scale * 1.02), "the output is"),
        (changed(rainfusion.ops.BlockScore, scale=lambda plan: -plan.problem.scale), "a higher score"),
        (changed(rainfusion.ops.Select, over="all"), "its quota"),
        (changed(rainfusion.ops.Select, mass=0.999), "another number of blocks"),
        (changed(rainfusion.ops.Quantise, centred=False), "the output is"),
        (changed(rainfusion.ops.Quantise, rotated=lambda plan: False), "the output is"),
    ],
    ids=["scale", "score", "over", "mass", "centred", "rotated"],
)
def test_it_finds_what_is_planned_wrong(monkeypatch, change, finding):
    assert any(finding in message for message in broken_in(monkeypatch, change))


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.08), ("fp8", 0.12)])
@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_the_oracle_of_8_bits_is_near_exact_attention(precision, omitted, most):
    changes = {"precision": precision, "omitted": omitted, "values": "normal", "poison": "", "scale": None}
    drawn = (dataclasses.replace(draw(seed), **changes) for seed in range(60))
    for problem in [problem for problem in drawn if problem.kv_len > 32 and problem.head_dim > 4][:12]:
        oracle = Oracle(problem, problem.tensors)
        exact = Oracle(dataclasses.replace(problem, precision=None), problem.tensors)
        mask = np.random.default_rng(0).random((problem.batch, problem.heads, oracle.q.blocks, oracle.kv.blocks)) < 0.5
        got, right = (each.attend(mask, omitted, given=True) for each in (oracle, exact))
        assert np.linalg.norm(got.out - right.out) <= most * np.linalg.norm(right.out)
        np.testing.assert_array_equal(np.isneginf(got.lse), np.isneginf(right.lse))


def test_it_finds_what_is_accepted_though_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(rainfusion, "attention", lambda q, k, v, **said: q)
    assert "accepted, though it does not fit" in failures_of(9, ("reference",))[0]["message"]
    monkeypatch.setattr(rainfusion, "attention", lambda q, k, v, **said: 1 // 0)
    assert "refused by ZeroDivisionError" in failures_of(9, ("reference",))[0]["message"]


def test_a_run_goes_on_where_it_ended(tmp_path, capsys):
    path = tmp_path / "state.json"
    for last in (2, 4):
        assert main(["--problems", "2", "--state", str(path), "--backend", "reference"]) == 0
        assert json.loads(path.read_text())["next_seed"] == last
    assert "4 problems" in capsys.readouterr().out


def test_a_problem_that_ended_the_process_is_a_failure(tmp_path):
    path = tmp_path / "state.json"
    run = steps(State(next_seed=5), path, ("reference",), problems=10, minutes=1)
    next(run)
    next(run)
    state = State.read(path)
    assert (state.next_seed, state.failures[0]["seed"]) == (7, 6)


def test_a_seed_is_replayed_and_described(capsys):
    assert main(["--seed", "1", "--backend", "reference"]) == 0
    assert "seed 1: batch=" in capsys.readouterr().out
    assert main(["--backend", "abacus"]) == 2


def test_several_workers_share_the_seeds(tmp_path, capsys):
    state, path = tmp_path / "state.json", tmp_path / "record.json"
    said = ["--problems", "24", "--workers", "2", "--backend", "reference"]
    assert main([*said, "--state", str(state), "--record", str(path)]) == 0
    facts = json.loads(path.read_text())
    assert (facts["problems"], facts["workers"], facts["failures"]) == (24, 2, [])
    # Each takes ten at a time: 0 to 9 and 20, 21; 10 to 19 and 30, 31.
    assert [State.read(tmp_path / f"state.json.{i}").next_seed for i in range(2)] == [22, 32]
    assert main([*said[:2], "--workers", "3", "--state", str(state)]) == 2
    assert "with 2 workers" in capsys.readouterr().out


def test_a_worker_that_crashes_is_followed_by_another(tmp_path, monkeypatch):
    state = State(next_seed=7, running=7, workers=2, problems=3)
    state.write(tmp_path / "state.json")
    worker = Worker(["--backend", "reference", "--share", "0/2"], tmp_path / "state.json", problems=3, starts=1, last=6)
    worker.process = subprocess.Popen([sys.executable, "-c", "import os; os._exit(139)"])
    worker.process.wait()
    assert not worker.goes_on(minutes=0)
    assert worker.goes_on(minutes=1)
    worker.process.wait()
    ended = State.read(worker.state)
    assert (worker.starts, ended.problems, ended.next_seed) == (2, 6, 21)
    assert [failure["message"] for failure in ended.failures] == ["the process ended within it"]
    assert not worker.goes_on(minutes=1)


@pytest.mark.filterwarnings("ignore::rainfusion.RainfusionWarning")
@pytest.mark.parametrize("seed", range(40))
def test_problems_for_accelerators_fit_their_oracle(seed):
    """The laws hold for them on the CPU too, under the limits of the CPU."""
    problem = draw_for(seed, "cuda:0")
    assert problem.dtype != "float64"
    assert problem.lengths is None or len(problem.lengths) == problem.batch
    if problem.q_len * problem.kv_len * problem.batch * problem.heads < 10**6:
        assert list(broken_laws(Subject(problem), ("reference",))) == []


def kind(problem):
    """What kernels of accelerators are compiled for."""
    tile = (problem.block, problem.head_dim, problem.dtype, problem.heads, problem.kv_heads)
    bits = (problem.precision, problem.rotate)
    return (*tile, *bits, problem.tensor_layout, problem.strides, problem.omitted, problem.order, problem.returns[0])


def test_seeds_of_a_worker_share_a_kind_on_accelerators():
    chunks = [[draw_for(first + i, "cuda:0") for i in range(SEEDS_A_KIND)] for first in range(0, 1200, SEEDS_A_KIND)]
    assert all(len({kind(problem) for problem in chunk}) == 1 for chunk in chunks)
    assert all(len({problem.kv_len for problem in chunk}) > 3 for chunk in chunks)
    drawn = [chunk[0] for chunk in chunks]
    assert len({(problem.block, problem.head_dim) for problem in drawn}) == 14
    assert {problem.dtype for problem in drawn} == {"float16", "bfloat16", "float32"}
    assert {problem.omitted for problem in drawn} == {"drop", "summary"}
    assert kind(draw_for(7 + 1200, "cuda:0")) == kind(drawn[0])
    shares = [problem.choice.sparsity for chunk in chunks for problem in chunk]
    heads = [problem.heads for chunk in chunks for problem in chunk]
    assert all(not isinstance(s, tuple) or len(s) == n for s, n in zip(shares, heads, strict=True))


def warn_as(module, category):
    exec("import warnings; warnings.warn('soon', category)", {"__name__": module, "category": category})


@pytest.mark.parametrize(
    ("module", "category", "counts"),
    [
        ("torch.jit._script", DeprecationWarning, False),
        ("torch", FutureWarning, False),
        ("torch.cuda", UserWarning, True),
        ("torchvision", DeprecationWarning, True),
        ("rainfusion.attention", DeprecationWarning, True),
    ],
)
def test_what_torch_warns_itself_of_is_no_failure(monkeypatch, module, category, counts):
    monkeypatch.setattr(fuzz_run, "broken_laws", lambda subject, backends: warn_as(module, category) or [])
    found = failures_of(0, ("reference",))
    assert [failure["message"] for failure in found] == [f"{category.__name__}: soon"] * counts
