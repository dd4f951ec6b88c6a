"""End to end: `rainfusion.attention`, as users call it, against the oracle under the mask it chose."""

from __future__ import annotations

from typing import Any

import numpy as np

import rainfusion
from rainfusion.core.ir import Plan
from rainfusion.core.mask import BlockMask
from rainfusion.plugins.conformance.cases import Case
from rainfusion.plugins.conformance.evidence import Evidence
from rainfusion.plugins.conformance.level import Level, check_choice, check_values, take_up
from rainfusion.plugins.conformance.target import Target


class EndToEnd(Level):
    """The whole call."""

    def test_attention(self, target: Target, case: Case, evidence: Evidence) -> None:
        """What the call returns is right: the mask, and output and log-sum-exp under that mask."""
        take_up(case, target, evidence)
        # The other levels ask for the log-sum-exp; who does not may get other kernels.
        plan = case.plan(returns=(*case.returns, "%mask"))
        got = target.outcome(plan, _call(target, case, plan))
        assert got.blocks is not None
        mask = BlockMask(got.blocks, case.problem.q_len, case.problem.kv_len, case.layout.block)
        if case.selects:
            check_choice(case, mask, evidence)
        elif plan.mask_is_input:
            assert np.array_equal(got.blocks, case.mask().blocks), "another mask came back than was given"
        check_values(case, None if plan.is_dense else mask, got, evidence)


def _call(target: Target, case: Case, plan: Plan) -> Any:
    tensors = target.tensors(case)
    mask = target.mask(case.mask()) if plan.mask_is_input else None
    if case.order == "given":  # a caller who keeps tokens in block order plans and lowers
        return rainfusion.lower(plan, device=str(target.device), backend=target.backend.name)(*tensors, mask=mask)
    layout = case.layout
    return rainfusion.attention(
        *tensors,
        grid=layout.grid,
        text=layout.text,
        text_position=layout.text_position,
        policy=case.policy,
        block=layout.block,  # type: ignore[arg-type]
        window=layout.window,
        sink=layout.sink,
        omitted=case.omitted,
        tensor_layout=case.problem.tensor_layout,
        scale=case.problem.scale,
        mask=mask,
        return_lse="%lse" in plan.returns,
        return_mask=True,
        backend=target.backend.name,
    )
