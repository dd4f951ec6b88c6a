"""Dense rows by the dense operator, through the real eager path: right, and without a copy between host and device."""

from __future__ import annotations

import numpy as np
import pytest
from no_round_trip import counted

from rainfusion.backends.torch_npu import lowering
from rainfusion.testing.cases import builtin_cases
from rainfusion.testing.oracle import expected
from rainfusion.testing.target import find_target

NAMES = ("video-bf16", "all_together-bf16", "text_at_the_end-f16", "paper_counting-f16", "summary-f16")
CASES = [case for case in builtin_cases() if case.name in NAMES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_rows(case, monkeypatch):
    monkeypatch.setattr(lowering, "seconds_saved", lambda problem, rows: 1.0)
    target, planned = find_target("torch_npu"), case.plan(returns=("%out", "%lse", "%mask"))
    lowered = target.lower(planned)
    assert "rows by npu::npu_fusion_attention" in str(lowered)
    tensors = target.tensors(case)
    got = target.results(planned, lowered(*tensors))
    right = expected(case, case.block_mask(got["%mask"]))
    np.testing.assert_allclose(got["%out"], right.out, rtol=0, atol=right.out_limit)
    np.testing.assert_allclose(got["%lse"], right.lse, rtol=0, atol=right.lse_limit)
    before = counted()
    lowered(*tensors)
    assert counted() == before


def test_all_cases_are_there():
    assert len(CASES) == len(NAMES)
