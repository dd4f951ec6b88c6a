"""The kit finds what it is there to find: backends that are wrong in one way, each caught by a test that names it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import rainfusion
from rainfusion import BackendSpec, Kernel
from rainfusion.backends.reference.backend import ReferenceBackend
from rainfusion.core import semantics
from rainfusion.plugins.conformance.cases import Case, every_case
from rainfusion.plugins.conformance.evidence import Evidence
from rainfusion.plugins.conformance.huge import check_heads, huge_heads, require_memory
from rainfusion.plugins.conformance.parity import compare
from rainfusion.plugins.conformance.suite import ConformanceSuite
from rainfusion.plugins.conformance.target import find_target
from rainfusion.plugins.manager import host

Operands = dict[str, Any]
NAMES = ("q", "k", "v", "q_order", "kv_order", "mask")


class Wrong(ReferenceBackend):
    """The reference with one part of it replaced."""

    name = "wrong"
    attend: Callable[[Operands], tuple[Any, Any]] | None = None
    select: Callable[..., Any] | None = None

    def kernels(self, plan: rainfusion.Plan, device: rainfusion.Device) -> Sequence[Kernel]:
        own = (("attend", type(self).attend, _build_attend), ("select", type(self).select, _build_select))
        return [
            Kernel((op,), lambda segment, plan, device, change=change, build=build: build(segment, plan, change))
            for op, change, build in own
            if change is not None
        ]


def _build_attend(segment: Any, plan: rainfusion.Plan, change: Any) -> Any:
    (op,) = segment.ops
    attrs = dict(op.attrs)
    bias = np.log(plan.kv_axis.counts).astype(np.float32) if "bias" in attrs else None
    fixed = {"block": attrs.get("block", plan.block), "scale": plan.problem.scale, "bias": bias}

    def run(*arrays: Any) -> tuple[Any, ...]:
        values = dict(zip(segment.inputs, arrays, strict=True))
        values |= {f"~{name}": ~x for name, x in values.items() if x.dtype == bool}
        operands = [None if name is None else values[name] for name in op.args]
        made = dict(zip(op.outs, change({**dict(zip(NAMES, operands, strict=True)), **fixed}), strict=False))
        return tuple(made[name] for name in segment.outputs)

    return run


def _build_select(segment: Any, plan: rainfusion.Plan, change: Any) -> Any:
    return lambda score: (change(score, plan),)


# -- the ways to be wrong --------------------------------------------------------------------------


def wrong_scale(x: Operands) -> Any:
    return semantics.attend(**{**x, "scale": x["scale"] * 1.01})


def logits_in_bfloat16(x: Operands) -> Any:
    coarse = (x["q"].astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return semantics.attend(**{**x, "q": coarse})


def always_float32(x: Operands) -> Any:
    return semantics.attend(**{**x, **{name: x[name].astype(np.float32) for name in "qkv"}})


def no_maximum_taken_off(x: Operands) -> Any:
    out, lse = semantics.attend(**x)
    with np.errstate(over="ignore"):
        return np.where(np.isfinite(np.exp(lse.astype(np.float32)))[..., None], out, np.inf), lse


def last_key_forgotten(x: Operands) -> Any:
    v = x["v"].copy()
    v[:, :, -1] = 0
    return semantics.attend(**{**x, "v": v})


def nan_leaks(x: Operands) -> Any:
    out, lse = semantics.attend(**x)
    with np.errstate(invalid="ignore"):  # weights of zero instead of blocks left out
        return out + 0 * x["v"].sum(axis=2, keepdims=True), lse


def mask_of_sample_0(x: Operands) -> Any:
    mask = x["mask"]
    return semantics.attend(**{**x, "mask": None if mask is None else np.repeat(mask[:1], len(mask), axis=0)})


def mask_of_head_0(x: Operands) -> Any:
    mask = x["mask"]
    return semantics.attend(**{**x, "mask": None if mask is None else np.repeat(mask[:, :1], mask.shape[1], axis=1)})


def heads_interleaved(x: Operands) -> Any:
    times = x["q"].shape[1] // x["k"].shape[1]
    return semantics.attend(**{**x, **{name: np.tile(x[name], (1, times, 1, 1)) for name in "kv"}})


def order_not_undone(x: Operands) -> Any:
    out, lse = semantics.attend(**x)
    return (out, lse) if x["q_order"] is None else (out[:, :, x["q_order"]], lse[:, :, x["q_order"]])


def lse_in_base_2(x: Operands) -> Any:
    out, lse = semantics.attend(**x)
    return out, lse / np.float32(np.log(2))


def summary_without_counts(x: Operands) -> Any:
    return semantics.attend(**{**x, "bias": None})


def writes_into_its_inputs(x: Operands) -> Any:
    x["q"] *= x["q"].dtype.type(0.5)
    return semantics.attend(**{**x, "scale": x["scale"] * 2})


_shared: dict[str, Any] = {}


def keeps_state_between_calls(x: Operands) -> Any:
    _shared["q"] = x["q"]
    time.sleep(0.02)
    return semantics.attend(**{**x, "q": _shared["q"]})


def never_twice_the_same(x: Operands) -> Any:
    out, lse = semantics.attend(**x)
    _shared["calls"] = _shared.get("calls", 0) + 1
    return out * np.float32(1 + 2.0**-20 * (_shared["calls"] % 2)), lse


def ties_to_the_higher_index(score: Any, plan: rainfusion.Plan) -> Any:
    free = plan.kv_axis.free_blocks
    mirrored = np.concatenate([score[..., :free][..., ::-1], score[..., free:]], axis=-1)
    mask = semantics.select(mirrored, policy=plan.policy, q=plan.q_axis, kv=plan.kv_axis)
    return np.concatenate([mask[..., :free][..., ::-1], mask[..., free:]], axis=-1)


def scores_in_bfloat16(score: Any, plan: rainfusion.Plan) -> Any:
    coarse = (score.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return semantics.select(coarse, policy=plan.policy, q=plan.q_axis, kv=plan.kv_axis)


def one_too_many(score: Any, plan: rainfusion.Plan) -> Any:
    mask = semantics.select(score, policy=plan.policy, q=plan.q_axis, kv=plan.kv_axis)
    mask[..., 0, int(np.argmin(mask[0, 0, 0]))] = True
    return mask


def nothing_protected(score: Any, plan: rainfusion.Plan) -> Any:
    mask = semantics.select(score, policy=plan.policy, q=plan.q_axis, kv=plan.kv_axis)
    mask[..., -1, 0] = False
    return mask


def nan_is_best(score: Any, plan: rainfusion.Plan) -> Any:
    best = np.where(np.isnan(score), np.inf, score)
    return semantics.select(best, policy=plan.policy, q=plan.q_axis, kv=plan.kv_axis)


ATTEND = {
    wrong_scale: "test_attend[whole_blocks-f32]",
    logits_in_bfloat16: "test_attend[whole_blocks-f32]",
    always_float32: "test_attend[whole_blocks-f64]",
    no_maximum_taken_off: "test_attend[large_logits-f32]",
    last_key_forgotten: "test_attend[ragged_row-bf16]",
    nan_leaks: "test_attend[poisoned_block_masked_out-f32]",
    mask_of_sample_0: "test_attend[batch-bf16]",
    mask_of_head_0: "test_attention[given_mask-f16]",
    heads_interleaved: "test_attend[grouped_heads-f16]",
    order_not_undone: "test_attention[video-bf16]",
    lse_in_base_2: "test_attend[log_sum_exp-bf16]",
    summary_without_counts: "test_attend[summary-bf16]",
    writes_into_its_inputs: "test_contract_inputs_are_left_alone[float32]",
    keeps_state_between_calls: "test_contract_two_threads",
    never_twice_the_same: "test_contract_same_answer_again",
}
SELECT = {
    ties_to_the_higher_index: "test_select[exact_ties-bf16]",
    scores_in_bfloat16: "test_select[close_scores-f16]",
    one_too_many: "test_select[ragged_row-f32]",
    nothing_protected: "test_select[text_at_the_end-f32]",
    nan_is_best: "test_attention[poisoned_block_not_chosen-f32]",
}


def results_in_float32(self: Any, array: Any, like: Any, dtype: str) -> Any:
    return array.astype("bool" if dtype == "bool" else "float32")


def values_change_on_the_way(self: Any, array: Any, device: Any, dtype: str | None = None) -> Any:
    return array if dtype is None else (array + 1e-3).astype(dtype)


def owns_everything(self: Any, array: Any) -> Any:
    return rainfusion.Device("cpu")


CLASS = {
    results_in_float32: ("from_native", "test_contract_results[float16]"),
    values_change_on_the_way: ("from_host", "test_contract_arrays[float32]"),
    owns_everything: ("device_of", "test_contract_foreign_objects_are_not_its_arrays"),
}


@dataclass
class Kit:
    """Announces a wrong backend in this process and runs single tests of the suite on it."""

    module: ModuleType

    def announce(self, **changes: Any) -> None:
        plain = {name: staticmethod(f) if name in ("attend", "select") else f for name, f in changes.items()}
        self.module.Wrong = type("Wrong", (Wrong,), plain)  # type: ignore[attr-defined]
        rainfusion.register(BackendSpec("wrong", "wrong_backend:Wrong"))

    def run(self, test: str) -> None:
        """Run one test, by the id it has in a report."""
        name, _, parameter = test.removesuffix("]").partition("[")
        method = getattr(ConformanceSuite(), name)
        arguments = {"target": find_target("wrong"), "evidence": Evidence()}
        wanted = method.__code__.co_varnames[: method.__code__.co_argcount]
        if parameter:
            cases = {case.name: case for case in every_case()}
            arguments |= {"case": cases.get(parameter), "selecting_case": cases.get(parameter), "dtype": parameter}
        method(**{key: value for key, value in arguments.items() if key in wanted})


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    made = Kit(ModuleType("wrong_backend"))
    monkeypatch.setitem(sys.modules, "wrong_backend", made.module)
    _shared.clear()
    yield made
    rainfusion.unregister("wrong")


TESTS = sorted({*ATTEND.values(), *SELECT.values(), *(test for _, test in CLASS.values())})


@pytest.mark.parametrize("test", TESTS)
def test_what_is_right_passes(kit: Kit, test: str) -> None:
    kit.announce(attend=lambda x: semantics.attend(**x))
    kit.run(test)


@pytest.mark.parametrize(("wrong", "test"), ATTEND.items(), ids=lambda x: getattr(x, "__name__", None))
def test_an_attention_that_is_wrong_fails(kit: Kit, wrong: Any, test: str) -> None:
    kit.announce(attend=wrong)
    with pytest.raises(AssertionError):
        kit.run(test)


@pytest.mark.parametrize(("wrong", "test"), SELECT.items(), ids=lambda x: getattr(x, "__name__", None))
def test_a_selection_that_is_wrong_fails(kit: Kit, wrong: Any, test: str) -> None:
    kit.announce(select=wrong)
    with pytest.raises(AssertionError):
        kit.run(test)


@pytest.mark.parametrize("wrong", CLASS, ids=lambda f: f.__name__)
def test_a_backend_that_breaks_the_contract_fails(kit: Kit, wrong: Any) -> None:
    method, test = CLASS[wrong]
    kit.announce(**{method: wrong})
    with pytest.raises(AssertionError):
        kit.run(test)


def test_near_ties_may_differ_and_nothing_else(kit: Kit) -> None:
    def nearly(score: Any, plan: rainfusion.Plan) -> Any:
        noise = np.random.default_rng(0).uniform(-1e-9, 1e-9, score.shape).astype(score.dtype)
        return semantics.select(score + noise, policy=plan.policy, q=plan.q_axis, kv=plan.kv_axis)

    kit.announce(select=nearly)
    kit.run("test_select[ragged_row-f32]")


def fourth_copy_reads_the_first(x: Operands) -> Any:
    out, lse = semantics.attend(**x)
    if out.shape[1] > 3 * 61:
        out[:, 3 * 61 : 4 * 61] = out[:, 2 * 61 + 5 : 3 * 61 + 5]
    return out, lse


@pytest.mark.parametrize(("attend", "fails"), [(None, False), (fourth_copy_reads_the_first, True)])
def test_heads_beyond_an_offset_are_told_from_others(kit: Kit, attend: Any, fails: bool) -> None:
    claims = rainfusion.Capabilities(head_dims=frozenset({8}), blocks=frozenset({(32, 32)}))
    kit.announce(attend=attend, capabilities=lambda self, device: claims)
    target, evidence = find_target("wrong"), Evidence()
    heads = huge_heads(target, "bshd", elements=3 * 61 * 256 * 8)
    assert heads.large.problem.heads == 4 * 61
    with pytest.raises(AssertionError, match="copy 3 of the heads is off") if fails else nullcontext():
        check_heads(target, heads, evidence)
    assert evidence.record["elements"] == 4 * 61 * 256 * 8


def test_memory_that_does_not_do_is_a_failure(kit: Kit) -> None:
    small = rainfusion.Device("acme", 0, memory=8 * 10**9)
    kit.announce(devices=lambda self: [small])
    target = find_target("wrong")
    with pytest.raises(pytest.fail.Exception, match="has 8 GB; --rainfusion-huge needs 22 GB"):
        require_memory(target, huge_heads(target, "bhsd"))


@pytest.mark.parametrize(
    ("change", "ok"), [({}, True), ({"attend": wrong_scale}, False), ({"select": one_too_many}, False)]
)
def test_parity_tells_agreement_from_difference(kit: Kit, change: Any, ok: bool) -> None:
    kit.announce(**change)
    cases = [case for case in every_case() if case.name in ("video-f32", "whole_blocks-bf16")]
    found = compare("reference", "wrong", cases)
    assert [c.case for c in found] == [case.name for case in cases]
    assert all(c.ok for c in found) == ok
    assert all((c.mask_agreement == 1.0) == ("select" not in change) for c in found)


def test_parity_names_what_it_does_not_compare(kit: Kit) -> None:
    claims = rainfusion.Capabilities(dtypes=frozenset({"float16"}))
    kit.announce(capabilities=lambda self, device: claims)
    (found,) = compare("wrong", "reference", [case for case in every_case() if case.name == "video-f32"])
    assert found.ok is None
    assert found.refused == "wrong on cpu: no dtype float32 (it has float16)"


class MoreCases:
    """A plugin that adds cases."""

    def __init__(self, *cases: Any) -> None:
        self.cases = cases

    @rainfusion.hookimpl
    def rainfusion_conformance_cases(self) -> Sequence[Any]:
        return self.cases


def test_plugins_add_cases() -> None:
    problem = rainfusion.AttentionProblem(1, 1, 300, 300, 16)
    for cases, names in (
        ((Case("mine", problem),), ["mine"]),
        ((Case("video-f32", problem),), None),
        (("mine",), None),
    ):
        plugin = MoreCases(*cases)
        host().manager.register(plugin)
        try:
            if names is None:
                with pytest.raises(rainfusion.core.errors.ProblemError):
                    every_case()
            else:
                assert [case.name for case in every_case()][-1:] == names
        finally:
            host().manager.unregister(plugin)


def test_the_same_inputs_are_made_everywhere() -> None:
    """These numbers are the kit's: a report with others was computed on other inputs."""
    cases = {case.name: case for case in every_case()}
    assert cases["video-bf16"].fingerprint()[:16] == "aa198bb601493305"
    assert cases["exact_ties-f32"].fingerprint()[:16] == "0cb939ae9bf5df8b"
    assert cases["clip-f64"].fingerprint()[:16] == "96159c2738b8d91b"
