"""What somebody outside the package adds runs on every backend: operations, policies, programs of their own.

Every backend gives the definition's answer, and what surrounds a foreign operation still runs on its kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign import PASSES, OwnBlockFirst
from open_programs import Programs

from rainfusion import AttentionProblem, TokenLayout, TopK, attention, plan
from rainfusion.core.ops import signature

PROGRAMS = Programs(AttentionProblem(2, 4, 203, 203, 16, kv_heads=2), TokenLayout((3, 7, 9), text=14, block=(16, 8)))
PLANS = PROGRAMS.plans()
BACKENDS = ("torch", "openvino")

pytestmark = pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", PLANS)
def test_every_plan_gives_the_definitions_answer(backend, kind):
    assert f"{backend:<10} " in PROGRAMS.check(PLANS[kind], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("insert", PASSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", PLANS)
def test_a_foreign_operation_runs_and_its_surroundings_stay_on_kernels(backend, insert, kind):
    PROGRAMS.stays_on_kernels(PLANS[kind], insert, backend)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_policy_of_ones_own_is_one_class_and_runs_everywhere(backend):
    out, mask = attention(
        *PROGRAMS.inputs(),
        grid=(3, 7, 9),
        text=14,
        block=(16, 8),
        sink=None,
        policy=OwnBlockFirst(0.6),
        return_mask=True,
        backend=backend,
    )
    planned = plan(PROGRAMS.problem, TokenLayout((3, 7, 9), text=14, block=(16, 8), sink=None), OwnBlockFirst(0.6))
    counts = planned.row_counts
    assert counts is not None
    np.testing.assert_array_equal(mask.counts.numpy(), np.broadcast_to(counts, mask.counts.shape))
    assert (np.diff(counts[:, 0]) > 0).all(), "head h keeps more than head h - 1"
    free = min(planned.q_axis.free_blocks, planned.kv_axis.free_blocks)
    own = np.arange(free)
    assert mask.blocks[:, :, own, own].all(), "every query block keeps its own"
    assert torch.isfinite(out).all()


def test_the_policy_is_known_to_plans_by_what_it_does_not_by_its_class():
    class Renamed(TopK):
        pass

    assert plan(PROGRAMS.problem, PROGRAMS.layout, Renamed(0.2)) == plan(PROGRAMS.problem, PROGRAMS.layout, TopK(0.2))

    class Fewer(TopK):
        def budget(self, q, kv, heads):
            return TopK(0.3).budget(q, kv, heads)

    one, other = plan(PROGRAMS.problem, PROGRAMS.layout, Fewer(0.2)), plan(PROGRAMS.problem, PROGRAMS.layout, TopK(0.2))
    assert one != other
    assert one.key != other.key
    assert one.key == plan(PROGRAMS.problem, PROGRAMS.layout, TopK(0.3)).key


def test_operations_say_what_they_read_and_make():
    for planned in PLANS.values():
        for op in planned.ops:
            roles = signature(type(op))
            assert {*op.operands} <= {*roles.operands}
            assert {*op.results} <= {*roles.results}
