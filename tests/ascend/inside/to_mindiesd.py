"""Lowering to MindIE-SD's operators, argument by argument, under the schemas in its extension library."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from emulated import A2, ASCEND_950, CPU, MINDIESD_BEFORE, Emulated, assert_fits, by_name, cases, target

from rainfusion.backends.torch_npu import operators
from rainfusion.backends.torch_npu.operators import Request, Tensors, kept_blocks, operator_for
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import Attend
from rainfusion.core.planner import plan
from rainfusion.core.policies import Fixed, TopK
from rainfusion.core.problem import AttentionProblem
from rainfusion.testing.oracle import expected

BLOCK_SPARSE, INDEX_LISTS = "mindiesd::block_sparse_attention", "mindiesd::rainfusionattention"
# A torch_npu that has none of it (2.9), so that MindIE-SD's come first.
REGISTERED = Emulated().mindiesd()
EVERYWHERE = (
    "video",
    "batch",
    "grouped_heads",
    "more_keys",
    "head_dim_80",
    "long_key_blocks",
    "strided",
    "given_order",
)


@pytest.fixture
def calls():
    REGISTERED.calls.clear()
    return REGISTERED.calls


@pytest.mark.parametrize("case", cases(*EVERYWHERE, "log_sum_exp"), ids=str)
def test_the_block_mask(monkeypatch, calls, case):
    got, right = target(monkeypatch).under(case, case.mask(), lse=True), expected(case, case.mask())
    np.testing.assert_allclose(got["%out"], right.out, rtol=0, atol=right.out_limit)
    np.testing.assert_allclose(got["%lse"], right.lse, rtol=0, atol=right.lse_limit)
    assert {operator for operator, _ in calls} == {BLOCK_SPARSE}


@pytest.mark.parametrize("case", cases(*EVERYWHERE), ids=str)
def test_lists_of_kept_blocks(monkeypatch, calls, case):
    got = target(monkeypatch, A2, by_name(INDEX_LISTS)).under(case, case.mask(), lse=False)
    right = expected(case, case.mask())
    np.testing.assert_allclose(got["%out"], right.out, rtol=0, atol=right.out_limit)
    assert {operator for operator, _ in calls} == {INDEX_LISTS}


def test_the_lists_are_those_of_every_sample():
    mask = torch.tensor([[[[1, 0, 1], [0, 1, 0]]], [[[0, 0, 1], [1, 1, 1]]]], dtype=torch.bool)
    blocks, counts = kept_blocks(mask)
    assert blocks.dtype == counts.dtype == torch.int64
    assert blocks[:, 0].tolist() == [[0, 2, -1], [1, -1, -1], [2, -1, -1], [0, 1, 2]]
    assert counts[:, 0].tolist() == [2, 1, 1, 3]


def test_rows_that_keep_nothing(monkeypatch, calls):
    problem = AttentionProblem(1, 2, 300, 300, 64, "float16")
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool).expand(1, 2, 3, 3)
    on = target(monkeypatch, A2, by_name(INDEX_LISTS))
    tensors = [torch.randn(problem.q_shape).half() for _ in range(3)]
    out = on.lower(plan(problem, policy=Fixed()))(*tensors, mask=BlockMask(mask, 300, 300, (128, 128)))
    assert torch.equal((out == 0).all(dim=-1)[0, 0], (torch.arange(300) >= 128) & (torch.arange(300) < 256))
    assert len(calls) == 1


def test_what_the_lists_operator_is_given(monkeypatch, calls):
    problem = AttentionProblem(2, 4, 300, 500, 80, "float16", 2)
    planned = plan(problem, TokenLayout(block=(64, 128)), TopK(0.5))
    on = target(monkeypatch, A2, by_name(INDEX_LISTS))
    on.lower(planned)(*(torch.randn(shape).half() for shape in (problem.q_shape, problem.kv_shape, problem.kv_shape)))
    ((_, given),) = calls
    shapes = {name: tuple(given.pop(name).shape) for name in ("query", "key", "value", "select_idx", "select_num_idx")}
    assert shapes == {
        "query": (600, 4, 128),
        "key": (1000, 2, 128),
        "value": (1000, 2, 128),
        "select_idx": (10, 4, 4),
        "select_num_idx": (10, 4),
    }
    assert given == {
        "blockshape": [64, 128],
        "attn_mask": None,
        "actual_seq_qlen": [300, 300],  # of each sample, not added up
        "actual_seq_kvlen": [500, 500],
        "block_table": None,
        "q_input_layout": "TND",
        "kv_input_layout": "TND",
        "head_num": 2,  # of the keys
        "mask_type": 0,
        "scale": 80**-0.5,
        "inner_precise": 0,
        "block_size": 0,
    }


@pytest.mark.parametrize("operator", [BLOCK_SPARSE, INDEX_LISTS])
def test_every_argument_is_declared(operator):
    problem = AttentionProblem(1, 2, 300, 300, 64, "float16")
    planned = plan(problem, policy=Fixed())
    tensors = [torch.zeros(problem.q_shape, dtype=torch.float16)] * 3
    mask = torch.ones((1, 2, 3, 3), dtype=torch.bool)
    given = by_name(operator).arguments(Tensors(*tensors, mask), Request.of(planned.find(Attend), planned, A2))
    assert set(given) == by_name(operator).keywords
    assert_fits(operator, given)


@pytest.mark.parametrize(
    ("chip", "how", "reason"),
    [
        (ASCEND_950, {}, "not on chip 950"),
        (A2, {"returns": ("%out", "%lse")}, "no log-sum-exp"),
        (A2, {"omitted": "summary"}, "no log-sum-exp"),
    ],
    ids=["950", "lse", "summary"],
)
def test_lists_are_refused(monkeypatch, chip, how, reason):
    planned = plan(AttentionProblem(1, 2, 300, 300, 64, "float16"), policy=TopK(0.5), **how)
    on = target(monkeypatch, chip, by_name(INDEX_LISTS))
    assert f"{INDEX_LISTS}: {reason}" in on.backend.objections(planned, CPU)


def test_group_sizes_of_the_lists_operator(monkeypatch):
    on = target(monkeypatch, A2, by_name(INDEX_LISTS))
    fits = [
        heads
        for heads in (1, 2, 3, 64, 128)
        if not on.backend.objections(
            plan(AttentionProblem(1, heads, 300, 300, 64, "float16", 1), policy=TopK(0.5)), CPU
        )
    ]
    assert fits == [1, 2, 64]


def test_an_older_operator_of_the_same_name_is_told_apart(monkeypatch):
    schema = torch._C.parse_schema(f"mindiesd::{MINDIESD_BEFORE}")
    monkeypatch.setattr(operators, "_operator", lambda operator: type("Before", (), {"_schema": schema}))
    said = operators.trouble(BLOCK_SPARSE, by_name(BLOCK_SPARSE).keywords)
    assert said.startswith("the one installed has another form, without actual_seq_lengths, ")
    assert "block_sparse_mask" in said


def test_mindie_sd_that_fails_to_import_is_a_reason(monkeypatch, tmp_path):
    (tmp_path / "mindiesd.py").write_text("import os\nraise OSError('libPTAExtensionOPS.so: no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    operators._mindiesd_trouble.cache_clear()
    said = operators.trouble("mindiesd::no_such_operator", frozenset())
    operators._mindiesd_trouble.cache_clear()
    assert said == "importing mindiesd failed: OSError: libPTAExtensionOPS.so: no such file"
    sys.modules.pop("mindiesd", None)


def test_without_mindie_sd_it_is_not_looked_for_where_it_is_not_needed(monkeypatch):
    monkeypatch.setattr(operators, "_mindiesd_trouble", lambda: pytest.fail("imported"))
    planned = plan(AttentionProblem(1, 2, 300, 300, 64, "float16"), policy=TopK(0.5))
    target(monkeypatch)
    assert operator_for(Request.of(planned.find(Attend), planned, A2)).operator == BLOCK_SPARSE
