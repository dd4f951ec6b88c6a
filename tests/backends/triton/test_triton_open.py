"""Programs of every kind on Triton's kernels: interpreted and small, or on a CUDA device in the sizes that matter."""

from __future__ import annotations

import pytest
import torch
from foreign import PASSES
from open_programs import Programs

from rainfusion import AttentionProblem, TokenLayout

if torch.cuda.is_available():
    LAYOUT = TokenLayout((4, 16, 24), text=77)  # 1613 tokens: ragged, and more than one padded block
    PROBLEMS = {
        "bf16 128": Programs(AttentionProblem(2, 4, 1613, 1613, 128, "bfloat16", 2), LAYOUT, "cuda", 2e-2),
        "f16 64": Programs(AttentionProblem(2, 4, 1613, 1613, 64, "float16", 4), LAYOUT, "cuda", 4e-3),
        "f32 80": Programs(AttentionProblem(2, 4, 1613, 1613, 80, "float32", 2), LAYOUT, "cuda", 2e-4),
    }
else:
    LAYOUT = TokenLayout((2, 4, 8), text=11, block=(32, 16), sink=None)  # interpreted: few programs, few steps
    PROBLEMS = {"f32 16": Programs(AttentionProblem(2, 2, 75, 75, 16, kv_heads=1), LAYOUT)}

PLANS = next(iter(PROBLEMS.values())).plans()

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning"),
]


@pytest.mark.parametrize("size", PROBLEMS)
@pytest.mark.parametrize("kind", PLANS)
def test_every_plan_gives_the_definitions_answer(size, kind):
    assert "triton     " in PROBLEMS[size].check(PROBLEMS[size].plans()[kind], "triton")


@pytest.mark.parametrize("insert", PASSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["topk-summary", "fixed-drop", "given", "hybrid-drop"])
def test_a_foreign_operation_runs_and_its_surroundings_stay_on_kernels(insert, kind):
    PROBLEMS[next(iter(PROBLEMS))].stays_on_kernels(PLANS[kind], insert, "triton")
