"""MindIE-SD's operators out of its own extension library: schemas, fake kernels, and the C++ path down to CANN's call.

Behind that call are the stand-ins (../stand_in), so a result says nothing about CANN.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated import by_name, mindiesd_schemas
from meta_kernels import CASES, results

from rainfusion.backends.torch_npu import operators
from rainfusion.backends.torch_npu.chips import CHIPS
from rainfusion.backends.torch_npu.detection import chip
from rainfusion.testing.cases import builtin_cases
from rainfusion.testing.oracle import expected
from rainfusion.testing.target import find_target

BLOCK_SPARSE, INDEX_LISTS = "mindiesd::block_sparse_attention", "mindiesd::rainfusionattention"
FUSION = "npu::npu_fusion_attention"
USED = [operator.operator for operator in operators.OPERATORS if operator.operator.startswith("mindiesd::")]


def only(monkeypatch, name):
    """One of MindIE-SD's operators, and fusion attention for what no block-sparse operator does."""
    monkeypatch.setattr(operators, "OPERATORS", (by_name(name), by_name(FUSION)))


def registered(name):
    return operators._operator(name)._schema


@pytest.mark.parametrize("name", USED)
def test_the_schema_is_the_one_in_the_library(name):
    text = mindiesd_schemas()[name.partition("::")[2]]
    written = torch._C.parse_schema(f"mindiesd::{text}")
    assert registered(name) == written


@pytest.mark.parametrize("name", USED)
def test_every_keyword_is_in_the_schema(name):
    taken = {argument.name for argument in registered(name).arguments}
    assert by_name(name).keywords <= taken


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("on", CHIPS, ids=lambda on: on.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_by_its_fake_kernels(case, on, name, monkeypatch):
    only(monkeypatch, name)
    planned, got = results(case, on, monkeypatch, returns=("%out", "%mask"))
    assert (got["%out"].shape, got["%out"].dtype) == (planned.problem.q_shape, torch.float16)


@pytest.mark.parametrize("on", CHIPS, ids=lambda on: on.name)
def test_the_fake_kernel_gives_a_log_sum_exp_in_float32(on, monkeypatch):
    only(monkeypatch, BLOCK_SPARSE)
    (case,) = (c for c in CASES if c.name == "video-f16")
    planned, got = results(case, on, monkeypatch)
    p = planned.problem
    assert (got["%lse"].shape, got["%lse"].dtype) == ((p.batch, p.heads, p.q_len), torch.float32)


def test_bfloat16_on_950_can_be_traced_here(monkeypatch):
    """Unlike with torch_npu's Meta kernel; docs/ascend.md says so."""
    only(monkeypatch, BLOCK_SPARSE)
    (case,) = (c for c in CASES if c.name == "video-f16")
    _, got = results(case, CHIPS[-1], monkeypatch, "bfloat16")
    assert got["%out"].dtype == torch.bfloat16


NAMES = ("video", "batch", "grouped_heads", "more_keys", "head_dim_80", "long_key_blocks", "given_order", "empty_rows")


@pytest.mark.parametrize("name", USED)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_the_eager_path_down_to_the_stand_in(name, dtype, monkeypatch):
    """Its C++ takes every argument, in eager mode, and hands CANN's function what that documents."""
    if name == INDEX_LISTS and not chip().has_index_lists:
        pytest.skip("not on this chip")
    monkeypatch.setattr(operators, "OPERATORS", (by_name(name),))
    target = find_target("torch_npu")
    cases = [case for case in builtin_cases() if case.name.removesuffix(f"-{dtype}") in NAMES]
    assert len(cases) == len(NAMES)
    for case in cases:
        wants_lse = name == BLOCK_SPARSE
        got, right = target.under(case, case.mask(), lse=wants_lse), expected(case, case.mask())
        np.testing.assert_allclose(got["%out"], right.out, rtol=0, atol=right.out_limit)
        if wants_lse:
            np.testing.assert_allclose(got["%lse"], right.lse, rtol=0, atol=right.lse_limit)


def test_the_library_refuses_other_layouts():
    """That its checks run at all."""
    q = torch.zeros((1, 1, 128, 64), dtype=torch.float16).to("npu")
    mask = torch.ones((1, 1, 1, 1), dtype=torch.int8).to("npu")
    with pytest.raises(RuntimeError, match="only supports 'TND' and 'BNSD', got BSND"):
        torch.ops.mindiesd.block_sparse_attention(q, q, q, mask, q_input_layout="BSND", kv_input_layout="BSND")
