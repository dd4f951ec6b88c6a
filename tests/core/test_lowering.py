"""Lowering: kernels get the longest part they understand, and never what they do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from foreign import PASSES, OwnBlockFirst, ScaleScores, scaled_key_means, scaled_output, scaled_scores, thinner_masks

from rainfusion import AttentionProblem, BlockMask, Fixed, Hybrid, Plan, TokenLayout, TopK, TopP, lower, plan
from rainfusion.backends.reference import ReferenceBackend
from rainfusion.core import lowering
from rainfusion.core.backend import Device, Kernel
from rainfusion.core.errors import LoweringError, PlanFormatError
from rainfusion.core.ops import Attend, AttendMeans, BlockMean, BlockScore, Merge, Select
from rainfusion.core.stages import Stages

CPU = Device("cpu")
PROBLEM = AttentionProblem(2, 4, 203, 203, 8, kv_heads=2)
LAYOUT = TokenLayout((3, 7, 9), text=14, block=(16, 8))
ALL = frozenset({BlockMean, BlockScore, Select, Attend, AttendMeans, Merge})


def recorder(seen: list, *understands: frozenset, takes=lambda segment: True):
    """A backend whose kernels run segments by definitions, and keep which segments they were given."""

    def build(segment, plan, device):
        Stages.of(segment)
        if not takes(segment):
            raise LoweringError("not this one")
        seen.append([op.name for op in segment.ops])

        def run(values):
            made = {name: values[name] for name in segment.inputs}
            for op in segment.ops:
                made.update(op.evaluate(made))
            return {name: made[name] for name in segment.outputs}

        return run

    class Recorder(ReferenceBackend):
        name = "recorder"

        def kernels(self, plan, device):
            return [Kernel(types, build) for types in understands]

    return Recorder()


def inputs():
    rng = np.random.default_rng(2)
    return [rng.standard_normal(s, dtype=np.float32) for s in (PROBLEM.q_shape, *[PROBLEM.kv_shape] * 2)]


def kinds():
    yield plan(PROBLEM, LAYOUT, TopK(0))
    for omitted in ("drop", "summary"):
        for policy in (TopK(0.2), TopP(0.5), Hybrid(0.3, 0.3), Fixed(), OwnBlockFirst(0.2)):
            yield plan(PROBLEM, LAYOUT, policy, omitted=omitted, returns=["%out", "%lse"])
    yield plan(PROBLEM, LAYOUT, omitted="summary", quotas=True, kv_lengths=True)


def operands(planned: Plan):
    given = {}
    if planned.takes("%mask"):
        blocks = np.random.default_rng(3).random((2, 4, planned.q_axis.blocks, planned.kv_axis.blocks)) < 0.4
        given["mask"] = BlockMask(blocks, 203, 203, (16, 8), LAYOUT)
    if planned.takes("%quotas"):
        given["quotas"] = planned.quotas(TopK(0.25))
    if planned.takes("%kv_lengths"):
        given["kv_lengths"] = np.array([203, 195])
    return given


def same(one, other):
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (one, other)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning")
def test_a_kernel_that_understands_everything_takes_whole_plans():
    for planned in kinds():
        seen: list = []
        run = lowering.lower(planned, recorder(seen, ALL), CPU, strict=True)
        assert len(run.steps) == len(seen) == 1
        assert len(seen[0]) == sum(1 for op in planned.ops if op.reads)
        same(run(*inputs(), **operands(planned)), lower(planned, backend="reference")(*inputs(), **operands(planned)))


@pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning")
@pytest.mark.parametrize("insert", PASSES, ids=lambda f: f.__name__)
def test_a_foreign_operation_is_never_claimed_never_dropped_and_leaves_its_surroundings_on_kernels(insert):
    for planned in kinds():
        changed = insert(planned)
        foreign = [op for op in changed.ops if type(op) not in ALL and op.reads]
        seen: list = []
        run = lowering.lower(changed, recorder(seen, ALL), CPU)
        by_definition = [op for step in run.steps if step.by == "definition" for op in step.segment.ops]
        assert by_definition == foreign
        expected = lower(changed, backend="reference")(*inputs(), **operands(changed))
        same(run(*inputs(), **operands(changed)), expected)
        assert Plan.from_json(changed.to_json()) == changed


def test_an_inserted_operation_cuts_the_plan_where_it_stands_and_nowhere_else():
    seen: list = []
    planned = plan(PROBLEM, LAYOUT, TopK(0.2), omitted="summary")
    lowering.lower(scaled_scores(planned), recorder(seen, ALL), CPU)
    assert seen == [
        ["block_mean", "block_mean", "block_score"],
        ["block_mean", "select", "attend", "attend_means", "merge"],
    ]
    seen.clear()
    lowering.lower(scaled_key_means(planned), recorder(seen, ALL), CPU)
    assert [part for part in seen if len(part) > 1] == [
        ["block_mean", "block_mean", "block_score", "select", "attend", "attend_means", "merge"]
    ] or sum(map(len, seen)) == 8


def test_the_longest_part_wins_and_a_kernel_that_declines_is_offered_less():
    planned = plan(PROBLEM, LAYOUT, TopK(0.2))
    seen: list = []
    chain, attend = frozenset({BlockMean, BlockScore, Select}), frozenset({Attend, AttendMeans, Merge})
    lowering.lower(planned, recorder(seen, attend, chain), CPU)
    assert seen == [["block_mean", "block_mean", "block_score", "select"], ["attend"]]
    seen.clear()
    lowering.lower(planned, recorder(seen, ALL, takes=lambda s: len(s.ops) < 4), CPU)
    assert seen == [["block_mean", "block_mean", "block_score"], ["select", "attend"]]
    seen.clear()
    run = lowering.lower(planned, recorder(seen, ALL, takes=lambda s: False), CPU)
    assert seen == []
    assert {step.by for step in run.steps} == {"definition"}
    with pytest.raises(LoweringError, match=r"has no kernel for `%qb = block_mean .*not this one.*strict=False"):
        lowering.lower(planned, recorder(seen, ALL, takes=lambda s: False), CPU, strict=True)


def test_two_attentions_in_one_program_are_two_parts():
    """A program of one's own: the same queries over two masks, joined; `Stages` refuses to see one attention in it."""
    planned = plan(PROBLEM, LAYOUT, TopK(0.2))
    attend = planned.find(Attend)
    assert attend is not None
    one = replace(attend, out="%a", lse="%a_lse")
    other = replace(one, mask=None, order=None, inverse=None, kv_order=None, out="%b", lse="%b_lse")
    merge = Merge(out_a="%a", lse_a="%a_lse", out_b="%b", lse_b="%b_lse", out="%out")
    both = replace(planned, ops=(*(op for op in planned.ops if op is not attend), one, other, merge))
    seen: list = []
    run = lowering.lower(both, recorder(seen, ALL), CPU)
    same(run(*inputs()), lower(both, backend="reference")(*inputs()))
    assert ["block_mean", "block_mean", "block_score", "select", "attend"] in seen
    assert all("merge" not in part for part in seen)


def test_what_a_kernel_returns_reaches_what_reads_it_whatever_the_names():
    """Values are known by their place in the program, not by names that the planner likes."""
    planned = plan(PROBLEM, LAYOUT, TopK(0.2), omitted="summary", returns=["%out", "%mask", "%kb"])
    fresh: dict[str, str] = {}
    ops = []
    for op in planned.ops:
        fields = {**op.operands, **op.results}
        for name in op.makes:
            fresh.setdefault(name, name if name in planned.returns else f"%v{len(fresh)}")
        ops.append(replace(op, **{field: fresh.get(name, name) for field, name in fields.items()}))
    renamed = replace(planned, ops=tuple(ops))
    assert renamed != planned
    for backend in ("reference", None):
        results = lower(renamed, like=inputs()[0], backend=backend)(*inputs())
        expected = lower(planned, like=inputs()[0], backend=backend)(*inputs())
        same(results[0], expected[0])
        same(results[1].blocks, expected[1].blocks)
        same(results[2], expected[2])


def test_an_operation_says_how_it_is_used():
    with pytest.raises(PlanFormatError, match="reads %nothing, which nothing before it makes"):
        replace(plan(PROBLEM, LAYOUT, TopK(0.2)), ops=(ScaleScores(score="%nothing", scaled="%out"),))
    with pytest.raises(PlanFormatError, match=r"operation .attend. is already defined by rainfusion"):
        type("Attend", (ScaleScores,), {"name": "attend"})


def test_a_plan_from_means_needs_no_tokens(rng):
    from rainfusion.core.passes import from_means

    q, k, v = inputs()
    whole = plan(PROBLEM, LAYOUT, TopK(0.2), returns=["%mask", "%qb", "%kb"])
    mask, qb, kb = lower(whole, backend="reference")(q, k, v)
    from_given = from_means(plan(PROBLEM, LAYOUT, TopK(0.2), returns=["%mask"]))
    assert from_given.given == ("%qb", "%kb")
    again = lower(from_given, backend="reference")(qb=qb, kb=kb)
    np.testing.assert_array_equal(again.blocks, mask.blocks)


def test_orders_are_shared_by_plans_of_one_layout_and_device():
    plans = [plan(PROBLEM, LAYOUT, TopK(share)) for share in (0.1, 0.2)]
    one, other = (lower(p, backend="reference").constants for p in plans)
    assert one("%order") is other("%order")
    assert one("%quotas") is not other("%quotas")


def test_scaled_output_is_what_the_caller_gets():
    planned = plan(PROBLEM, LAYOUT, TopK(0.2))
    out = lower(scaled_output(planned), backend="reference")(*inputs())
    np.testing.assert_allclose(out, 0.5 * lower(planned, backend="reference")(*inputs()), rtol=1e-6)


def test_thinner_masks_keep_less():
    planned = plan(PROBLEM, LAYOUT, TopK(0.2), returns=["%out", "%mask"])
    out, mask = lower(thinner_masks(planned), backend="reference")(*inputs())
    _, before = lower(planned, backend="reference")(*inputs())
    assert np.isfinite(out).all()
    assert mask.density < before.density
