"""Arguments of any kind to the methods of public objects: accepted, or refused in rainfusion's words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import rainfusion
from rainfusion import ops, passes
from rainfusion.integrations.config import RainFusionConfig
from rainfusion.integrations.flex_attention import from_flex, to_flex
from rainfusion.integrations.report import Report, Row


class Fails:
    """Every look at it fails."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(name)

    def __eq__(self, other: object) -> bool:
        raise ValueError("no comparison")

    def __hash__(self) -> int:
        raise ValueError("no hash")


ANYTHING = (
    *(None, 3, -1, 10**30, 2.5, float("nan"), 1j, True, ..., int, Fails()),
    *("", "x", "a" * 100_000, "\ud800", "%q", b"x"),
    *([], [1], ["a", None], (), (1, 2), {}, {"a": 1}, {1: 2}, slice(1, 2)),
    *(np.zeros(3), np.array(3), np.array("x"), np.zeros((2, 2), object), torch.zeros(2)),
)
LAYOUT = rainfusion.TokenLayout((2, 4, 4), text=3, block=4, sink=None)
PROBLEM = rainfusion.AttentionProblem(1, 2, 35, 35, 8, "float32")


def subjects() -> dict[str, Any]:
    x = np.zeros((1, 2, 35, 8), np.float32)
    plan = rainfusion.plan(PROBLEM, LAYOUT, rainfusion.TopK(0.5))
    mask = rainfusion.select(x, x, grid=(2, 4, 4), text=3, block=4, sink=None, sparsity=0.5, backend="reference")
    config = RainFusionConfig()
    return {
        "plan": plan,
        "run": rainfusion.lower(plan, like=x, backend="reference"),
        "mask": mask,
        "packed": mask.packed(),
        "layout": LAYOUT,
        "problem": PROBLEM,
        "grid": rainfusion.Grid(2, 3, 4),
        "config": config,
        "topk": rainfusion.TopK(0.5),
        "shares": rainfusion.TopK((0.5, 0.2), "paper"),
        "topp": rainfusion.TopP(0.5),
        "hybrid": rainfusion.Hybrid(0.5, 0.5),
        "fixed": rainfusion.Fixed(),
        "report": Report(config, {"m": 1}, (Row("m", 0, 0, "", 0, "sparse", "", 0.5),)),
    }


# Executables: what `call` hands from one to the other, after `check`. Constants are a mapping. Policies: what planning
# calls.
INTERNAL = {"run.compute", "run.check_operands", "run.constants", "run.restore"}
INTERNAL |= {f"{policy}.score" for policy in ("topk", "shares", "topp", "hybrid", "fixed")}


def methods() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, subject in subjects().items():
        for method in dir(subject):
            if not method.startswith("_") and f"{name}.{method}" not in INTERNAL:
                function = getattr(subject, method)
                if inspect.ismethod(function):
                    yield f"{name}.{method}", function
    for function in (
        *(passes.dense, passes.select_blocks, passes.given_mask, passes.summarise_omitted, passes.in_window_order),
        *(passes.limit_lengths, passes.returning, passes.from_means, passes.prune, passes.quantised),
        *(rainfusion.Plan, rainfusion.BlockMask, rainfusion.TokenLayout, rainfusion.AttentionProblem),
        *(ops.Data.from_dict, to_flex, from_flex),
    ):
        yield function.__qualname__, function


def message(function: Callable[..., Any], arguments: list[Any]) -> str:
    """Why a call is refused; empty where it is not."""
    try:
        function(*arguments)
    except (rainfusion.RainfusionError, OSError) as error:
        return str(error)
    return ""


METHODS = dict(methods())


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some methods write files


@pytest.mark.parametrize("name", METHODS)
def test_any_argument_is_taken_or_refused_in_words(name: str) -> None:
    function = METHODS[name]
    given = [p for p in inspect.signature(function).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    needed = max(sum(p.default is p.empty for p in given), min(len(given), 1))
    said = [message(function, [anything] * needed) for anything in ANYTHING if given]
    assert all(len(text) < 1500 for text in said)


@pytest.mark.parametrize("kind", [3, int, "attend", None])
def test_find_takes_types_of_operations(kind: Any) -> None:
    plan = rainfusion.plan(PROBLEM, LAYOUT, rainfusion.TopK(0.5))
    assert isinstance(plan.find(ops.Attend), ops.Attend)
    with pytest.raises(rainfusion.PlanFormatError, match=r"no type of operations; give one of rainfusion\.ops"):
        plan.find(kind)


def test_a_column_that_reports_do_not_have_is_named() -> None:
    report = subjects()["report"]
    assert report.count(kind="sparse") == 1
    with pytest.raises(rainfusion.RainfusionError, match="column='colour' is not known; choose one of 'model'"):
        report.count(colour="red")


class Odd(rainfusion.Policy):
    """A policy whose answers are set from outside."""

    answer: Any = None
    before: Any = None

    def budget(self, q: Any, kv: Any, heads: int) -> Any:
        return self.answer

    def prior(self, q: Any, kv: Any) -> Any:
        return self.before


@pytest.mark.parametrize("anything", ANYTHING, ids=lambda anything: type(anything).__name__)
def test_policies_may_answer_anything(monkeypatch: pytest.MonkeyPatch, anything: Any) -> None:
    arguments = [passes.dense(PROBLEM, LAYOUT), Odd()]  # not `rainfusion.plan`, which keeps what it has planned
    good = rainfusion.TopK(0.5).budget(LAYOUT.axis(35, 0), LAYOUT.axis(35, 1), 2)
    for answer in (anything, *(replace(good, **{name: anything}) for name in ("quotas", "mass", "over"))):
        monkeypatch.setattr(Odd, "answer", answer)
        message(passes.select_blocks, arguments)
    monkeypatch.setattr(Odd, "answer", good)
    assert not message(passes.select_blocks, arguments)
    monkeypatch.setattr(Odd, "before", anything)
    message(passes.select_blocks, arguments)
