"""The real eager path where CANN lacks block-sparse attention: the next operator serves, which is said once."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import rainfusion
from rainfusion.core.errors import RainfusionWarning, SparsityWarning
from rainfusion.testing.cases import builtin_cases
from rainfusion.testing.oracle import expected
from rainfusion.testing.target import find_target

NAMES = ("video-bf16", "all_together-f16", "blocks_of_32-f16", "poisoned_block_in_a_video-f16")


def test_gives_way_once_and_is_right_afterwards():
    target = find_target("torch_npu")
    cases = [case for case in builtin_cases() if case.name in NAMES]
    assert len(cases) == len(NAMES)
    with pytest.warns(
        RainfusionWarning, match=r"aclnnBlockSparseAttention.* not in libopapi.so.*fusion_attention instead"
    ):
        target.under(cases[0], cases[0].mask(), lse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RainfusionWarning)
        warnings.simplefilter("ignore", SparsityWarning)
        for case in cases:
            got, right = target.under(case, case.mask(), lse=True), expected(case, case.mask())
            np.testing.assert_allclose(got["%out"], right.out, rtol=0, atol=right.out_limit)
            np.testing.assert_allclose(got["%lse"], right.lse, rtol=0, atol=right.lse_limit)


def test_what_no_operator_can_do_goes_to_the_portable_backend_and_says_why():
    problem = rainfusion.AttentionProblem(1, 40, 32_760, 32_760, 128, "bfloat16")
    choice = rainfusion.choose(rainfusion.plan(problem), like=torch.empty(1, device="npu"))
    assert choice.candidate.backend.name == "torch"
    (refused,) = [refusal for refusal in choice.refusals if refusal.backend == "torch_npu"]
    assert refused.stage == "reject"
    assert "the installed CANN lacks it" in refused.reason
    assert "would take 40.0 GiB" in refused.reason
    with pytest.raises(rainfusion.core.errors.NoBackendError, match=r"would take 40\.0 GiB"):
        rainfusion.choose(rainfusion.plan(problem), device="npu:0", backend="torch_npu")
