"""The kit finds what it is there to find: backends that are wrong in one way, each caught by a test that names it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

import rainfusion
from rainfusion import BackendSpec, Kernel
from rainfusion.backends.reference import ReferenceBackend
from rainfusion.core import ops
from rainfusion.core.errors import BackendError
from rainfusion.core.ops import Attend, AttendMeans, Op, Select
from rainfusion.plugins.manager import host
from rainfusion.testing.cases import Case, every_case
from rainfusion.testing.huge import check_heads, huge_heads, require_memory
from rainfusion.testing.observation import agree
from rainfusion.testing.observe import observe
from rainfusion.testing.suite import ConformanceSuite
from rainfusion.testing.target import find_target

pytestmark = pytest.mark.kit
Operands = dict[str, Any]
Change = Callable[..., Any]


def definition(kind: type[Op]) -> Change:
    """The definition of an operation, called with operands and attributes by name."""
    roles = ops.signature(kind)
    names = {name: f"%{name}" for name in (*roles.operands, *roles.results)}

    def defined(**x: Any) -> Any:
        return kind(**names, **{a: x[a] for a in roles.attributes}).meaning(*(x[name] for name in roles.operands))

    return defined


attend, attend_means, select = (definition(kind) for kind in (Attend, AttendMeans, Select))
DEFINITIONS = {Attend: attend, AttendMeans: attend_means, Select: select}


class Wrong(ReferenceBackend):
    """The reference with the definition of some operations replaced, by operation."""

    name = "wrong"
    changes: ClassVar[dict[type[Op], Change]] = {}

    def kernels(self, plan: rainfusion.Plan, device: rainfusion.Device) -> Sequence[Kernel]:
        return [Kernel(frozenset({kind}), build(change)) for kind, change in type(self).changes.items()]


def build(change: Change) -> Any:
    """A kernel for one operation: `change` is called with the operands and attributes by name."""

    def kernel(segment: Any, plan: rainfusion.Plan, device: Any) -> Any:
        (op,) = segment.ops
        roles = ops.signature(type(op))
        attributes = {name: getattr(op, name) for name in roles.attributes}

        def run(values: Any) -> dict[str, Any]:
            operands = {
                name: None if op.operands.get(name) is None else values[op.operands[name]] for name in roles.operands
            }
            made = change({**operands, **attributes})
            made = made if isinstance(made, tuple) else (made,)
            named = zip((getattr(op, name) for name in roles.results), made, strict=True)
            return {name: value for name, value in named if name is not None}

        return run

    return kernel


# -- the ways to be wrong --------------------------------------------------------------------------


def wrong_scale(x: Operands) -> Any:
    return attend(**{**x, "scale": x["scale"] * 1.01})


def logits_in_bfloat16(x: Operands) -> Any:
    coarse = (x["q"].astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return attend(**{**x, "q": coarse})


def always_float32(x: Operands) -> Any:
    return attend(**{**x, **{name: x[name].astype(np.float32) for name in "qkv"}})


def no_maximum_taken_off(x: Operands) -> Any:
    out, lse = attend(**x)
    with np.errstate(over="ignore"):
        return np.where(np.isfinite(np.exp(lse.astype(np.float32)))[..., None], out, np.inf), lse


def last_key_forgotten(x: Operands) -> Any:
    v = x["v"].copy()
    v[:, :, -1] = 0
    return attend(**{**x, "v": v})


def nan_leaks(x: Operands) -> Any:
    out, lse = attend(**x)
    with np.errstate(invalid="ignore"):  # weights of zero instead of blocks left out
        return out + 0 * x["v"].sum(axis=2, keepdims=True), lse


def empty_rows_are_nan(x: Operands) -> Any:
    out, lse = attend(**x)
    return np.where(np.isneginf(lse)[..., None], np.float32(np.nan), out), lse


def empty_rows_have_the_least_lse(x: Operands) -> Any:
    out, lse = attend(**x)
    return out, np.maximum(lse, np.finfo(np.float32).min)


def padded_keys_take_part(x: Operands) -> Any:
    return attend(**{**x, "lengths": None})


def padded_queries_are_computed(x: Operands) -> Any:
    return attend(**{**x, "lengths_on_queries": False})


def mask_of_sample_0(x: Operands) -> Any:
    mask = x["mask"]
    return attend(**{**x, "mask": None if mask is None else np.repeat(mask[:1], len(mask), axis=0)})


def mask_of_head_0(x: Operands) -> Any:
    mask = x["mask"]
    return attend(**{**x, "mask": None if mask is None else np.repeat(mask[:, :1], mask.shape[1], axis=1)})


def heads_interleaved(x: Operands) -> Any:
    times = x["q"].shape[1] // x["k"].shape[1]
    return attend(**{**x, **{name: np.tile(x[name], (1, times, 1, 1)) for name in "kv"}})


def order_not_undone(x: Operands) -> Any:
    out, lse = attend(**x)
    return (out, lse) if x["order"] is None else (out[:, :, x["order"]], lse[:, :, x["order"]])


def lse_in_base_2(x: Operands) -> Any:
    out, lse = attend(**x)
    return out, lse / np.float32(np.log(2))


def summary_without_counts(x: Operands) -> Any:
    out, lse = attend_means(**x)
    return out, lse - np.float32(np.log(x["block"][1]))


def writes_into_its_inputs(x: Operands) -> Any:
    x["q"] *= x["q"].dtype.type(0.5)
    return attend(**{**x, "scale": x["scale"] * 2})


_shared: dict[str, Any] = {}


def keeps_state_between_calls(x: Operands) -> Any:
    _shared["q"] = x["q"]
    time.sleep(0.02)
    return attend(**{**x, "q": _shared["q"]})


def never_twice_the_same(x: Operands) -> Any:
    out, lse = attend(**x)
    _shared["calls"] = _shared.get("calls", 0) + 1
    return out * np.float32(1 + 2.0**-20 * (_shared["calls"] % 2)), lse


def ties_to_the_higher_index(x: Operands) -> Any:
    score, free = x["score"], x["kv"].free_blocks
    mirrored = np.concatenate([score[..., :free][..., ::-1], score[..., free:]], axis=-1)
    mask = select(**{**x, "score": mirrored})
    return np.concatenate([mask[..., :free][..., ::-1], mask[..., free:]], axis=-1)


def scores_in_bfloat16(x: Operands) -> Any:
    coarse = (x["score"].astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    return select(**{**x, "score": coarse})


def one_too_many(x: Operands) -> Any:
    mask = select(**x)
    mask[..., 0, int(np.argmin(mask[0, 0, 0]))] = True
    return mask


def nothing_protected(x: Operands) -> Any:
    mask = select(**x)
    mask[..., -1, 0] = False
    return mask


def nan_is_best(x: Operands) -> Any:
    return select(**{**x, "score": np.where(np.isnan(x["score"]), np.inf, x["score"])})


def quotas_of_head_0(x: Operands) -> Any:
    return select(**{**x, "quotas": x["quotas"][:1]})


def quotas_of_at_least_one(x: Operands) -> Any:
    return select(**{**x, "quotas": np.maximum(x["quotas"], 1)})


def padded_blocks_are_chosen(x: Operands) -> Any:
    return select(**{**x, "lengths": None})


def protection_within_the_budget(x: Operands) -> Any:
    return select(**{**x, "over": "free"})


def mass_left_out(x: Operands) -> Any:
    return select(**{**x, "mass": None})


WRONG: dict[type[Op], dict[Change, str]] = {
    Attend: {
        wrong_scale: "test_attend[whole_blocks-f32]",
        logits_in_bfloat16: "test_attend[whole_blocks-f32]",
        always_float32: "test_attend[whole_blocks-f64]",
        no_maximum_taken_off: "test_attend[large_logits-f32]",
        last_key_forgotten: "test_attend[ragged_row-bf16]",
        nan_leaks: "test_attend[poisoned_block_masked_out-f32]",
        empty_rows_are_nan: "test_attend[empty_rows-f32]",
        empty_rows_have_the_least_lse: "test_attend[empty_rows-f32]",
        padded_keys_take_part: "test_attend[lengths_of_keys_alone-bf16]",
        padded_queries_are_computed: "test_attend[lengths_in_dense-bf16]",
        mask_of_sample_0: "test_attend[batch-bf16]",
        mask_of_head_0: "test_attention[given_mask-f16]",
        heads_interleaved: "test_attend[grouped_heads-f16]",
        order_not_undone: "test_attention[video-bf16]",
        lse_in_base_2: "test_attend[log_sum_exp-bf16]",
        writes_into_its_inputs: "test_contract_inputs_are_left_alone[float32]",
        keeps_state_between_calls: "test_contract_two_threads",
        never_twice_the_same: "test_contract_same_answer_again",
    },
    AttendMeans: {summary_without_counts: "test_attend[summary-bf16]"},
    Select: {
        ties_to_the_higher_index: "test_select[exact_ties-bf16]",
        scores_in_bfloat16: "test_select[close_scores-f16]",
        one_too_many: "test_select[ragged_row-f32]",
        nothing_protected: "test_select[text_at_the_end-f32]",
        nan_is_best: "test_attention[poisoned_block_not_chosen-f32]",
        quotas_of_head_0: "test_select[shares_of_heads-f32]",
        quotas_of_at_least_one: "test_select[quotas-f32]",
        padded_blocks_are_chosen: "test_select[lengths-f32]",
        protection_within_the_budget: "test_select[paper_counting-f32]",
        mass_left_out: "test_select[count_and_mass-f32]",
    },
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

    def announce(self, changes: dict[type[Op], Change] | None = None, **methods: Any) -> None:
        self.module.Wrong = type("Wrong", (Wrong,), {"changes": changes or {}, **methods})  # type: ignore[attr-defined]
        rainfusion.register(BackendSpec("wrong", "wrong_backend:Wrong"))

    def run(self, test: str) -> None:
        """Run one test, by the id it has in a report."""
        name, _, parameter = test.removesuffix("]").partition("[")
        method = getattr(ConformanceSuite(), name)
        arguments: dict[str, Any] = {"target": find_target("wrong"), "note": {}}
        wanted = method.__code__.co_varnames[: method.__code__.co_argcount]
        if parameter:
            cases = {case.name: case for case in every_case()}
            arguments |= {"case": cases.get(parameter), "selecting_case": cases.get(parameter), "dtype": parameter}
        method(**{key: value for key, value in arguments.items() if key in wanted})


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    kit = Kit(ModuleType("wrong_backend"))
    monkeypatch.setitem(sys.modules, "wrong_backend", kit.module)
    _shared.clear()
    yield kit
    rainfusion.unregister("wrong")


TESTS = sorted(
    {*(test for wrongs in WRONG.values() for test in wrongs.values()), *(test for _, test in CLASS.values())}
)


@pytest.mark.parametrize("test", TESTS)
def test_what_is_right_passes(kit: Kit, test: str) -> None:
    kit.announce({kind: lambda x, f=definition: f(**x) for kind, definition in DEFINITIONS.items()})
    kit.run(test)


@pytest.mark.parametrize(
    ("kind", "wrong", "test"),
    [(kind, wrong, test) for kind, wrongs in WRONG.items() for wrong, test in wrongs.items()],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_an_operation_that_is_wrong_fails(kit: Kit, kind: type[Op], wrong: Any, test: str) -> None:
    kit.announce({kind: wrong})
    with pytest.raises((AssertionError, BackendError)):  # the latter where a call itself finds it out
        kit.run(test)


@pytest.mark.parametrize("wrong", CLASS, ids=lambda f: f.__name__)
def test_a_backend_that_breaks_the_contract_fails(kit: Kit, wrong: Any) -> None:
    method, test = CLASS[wrong]
    kit.announce(**{method: wrong})
    with pytest.raises((AssertionError, BackendError)):  # the latter where a call itself finds it out
        kit.run(test)


@pytest.mark.parametrize(
    ("changes", "omitted", "is_right"),
    [
        ({}, "drop", True),
        ({}, "summary", True),
        ({Attend: lse_in_base_2}, "drop", False),
        ({Attend: empty_rows_are_nan}, "drop", False),
        ({Attend: empty_rows_have_the_least_lse}, "drop", False),
        ({AttendMeans: summary_without_counts}, "summary", False),
    ],
)
def test_pieces_of_the_keys_are_told_from_others(kit: Kit, changes: Any, omitted: str, is_right: bool) -> None:
    kit.announce(changes)
    for count in (2, 4):
        with nullcontext() if is_right else pytest.raises((AssertionError, BackendError)):
            ConformanceSuite().test_pieces_of_the_keys(find_target("wrong"), "float32", omitted, "some_none", count)


def test_near_ties_may_differ_and_nothing_else(kit: Kit) -> None:
    def nearly(x: Operands) -> Any:
        noise = np.random.default_rng(0).uniform(-1e-9, 1e-9, x["score"].shape).astype(x["score"].dtype)
        return select(**{**x, "score": x["score"] + noise})

    kit.announce({Select: nearly})
    kit.run("test_select[ragged_row-f32]")


def fourth_copy_reads_the_first(x: Operands) -> Any:
    out, lse = attend(**x)
    if out.shape[1] > 3 * 61:
        out[:, 3 * 61 : 4 * 61] = out[:, 2 * 61 + 5 : 3 * 61 + 5]
    return out, lse


@pytest.mark.parametrize(("wrong", "fails"), [(None, False), (fourth_copy_reads_the_first, True)])
def test_heads_beyond_an_offset_are_told_from_others(kit: Kit, wrong: Any, fails: bool) -> None:
    claims = rainfusion.Capabilities(head_dims=frozenset({8}), blocks=frozenset({(32, 32)}))
    kit.announce({Attend: wrong} if wrong else {}, capabilities=lambda self, device: claims)
    target = find_target("wrong")
    heads = huge_heads(target, "bshd", elements=3 * 61 * 112 * 8)
    assert heads.large.problem.heads == 4 * 61
    with pytest.raises(AssertionError, match="copy 3 of the heads is off") if fails else nullcontext():
        check_heads(target, heads)


def test_memory_that_does_not_do_is_a_failure(kit: Kit) -> None:
    small = rainfusion.Device("acme", 0, memory=8 * 10**9)
    kit.announce(devices=lambda self: [small])
    target = find_target("wrong")
    with pytest.raises(pytest.fail.Exception, match="has 8 GB; --rainfusion-huge needs 21 GB"):
        require_memory(target, huge_heads(target, "bhsd"))


@pytest.mark.parametrize(
    ("changes", "ok"),
    [({}, True), ({Attend: wrong_scale}, False), ({Select: one_too_many}, False)],
    ids=["right", "wrong scale", "one too many"],
)
def test_parity_tells_agreement_from_difference(kit: Kit, changes: Any, ok: bool) -> None:
    kit.announce(changes)
    cases = [case for case in every_case() if case.name in ("video-f32", "whole_blocks-bf16")]
    targets = find_target("reference"), find_target("wrong")
    found = [agree(*(observe(t, case, level) for t in targets)) for case in cases for level in ("attend", "attention")]
    assert all(x.ok for x in found) == ok
    assert all(x.same_mask in (None, 1.0) for x in found) == (Select not in changes)


def test_what_is_not_claimed_is_named_and_not_compared(kit: Kit) -> None:
    claims = rainfusion.Capabilities(dtypes=frozenset({"float16"}))
    kit.announce(capabilities=lambda self, device: claims)
    (case,) = (case for case in every_case() if case.name == "video-f32")
    found = agree(*(observe(find_target(name), case, "attend") for name in ("wrong", "reference")))
    assert found.ok is None
    assert found.why == "wrong on cpu does not claim it: no dtype float32 (it has float16)"


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
                with pytest.raises(rainfusion.ProblemError):
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
