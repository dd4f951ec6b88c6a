"""Lowering to torch_npu's operators, argument by argument, under the schemas that the wheel lists."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from emulated import A2, A3, ASCEND_950, CPU, Emulated, assert_fits, by_name, cases, target
from torch.utils._python_dispatch import TorchDispatchMode

from rainfusion.backends.reference import ReferenceBackend
from rainfusion.backends.torch_npu import detection, lowering, operators
from rainfusion.backends.torch_npu.chips import CHIPS, chip_of
from rainfusion.backends.torch_npu.operators import Request, Tensors
from rainfusion.core.errors import BackendUnavailableError, LoweringError, RainfusionWarning
from rainfusion.core.layout import TokenLayout
from rainfusion.core.lowering import lower
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import Attend, Op, operand, result
from rainfusion.core.passes import quantised
from rainfusion.core.plan import Plan
from rainfusion.core.planner import plan
from rainfusion.core.policies import Fixed, TopK
from rainfusion.core.problem import AttentionProblem
from rainfusion.testing.oracle import expected

BLOCK_SPARSE, FUSION = "npu::npu_block_sparse_attention", "npu::npu_fusion_attention"
REGISTERED = Emulated().torch_npu()


@pytest.fixture
def calls():
    REGISTERED.calls.clear()
    return REGISTERED.calls


def some_plan(*, block=(128, 128), dim=64, dtype="bfloat16", batch=2, heads=4, kv_heads=2, length=300, **how):
    problem = AttentionProblem(batch, heads, length, length, dim, dtype, kv_heads)
    return plan(problem, TokenLayout(block=block), TopK(0.5), **how)


def call_once(monkeypatch, planned, chip=A2):
    on = target(monkeypatch, chip)
    p = planned.problem
    q, k, v = (torch.randn(shape).to(getattr(torch, p.dtype)) for shape in (p.q_shape, p.kv_shape, p.kv_shape))
    return on.lower(planned)(q, k, v)


@pytest.mark.parametrize("operator", [BLOCK_SPARSE, FUSION])
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
@pytest.mark.parametrize("needs_lse", [False, True])
def test_every_argument_is_declared_with_that_type(operator, chip, needs_lse):
    planned = some_plan(dim=80)
    q, k, v = (
        torch.zeros(shape, dtype=torch.bfloat16) for shape in (planned.problem.q_shape, *[planned.problem.kv_shape] * 2)
    )
    mask = torch.ones((2, 4, 3, 3), dtype=torch.bool)
    request = replace(Request.of(planned.find(Attend), planned, chip), needs_lse=needs_lse)
    given = by_name(operator).arguments(Tensors(q, k, v, mask), request)
    assert set(given) == by_name(operator).keywords
    assert_fits(operator, given)


@pytest.mark.parametrize(("chip", "precise"), [(A2, 0), (A3, 0), (ASCEND_950, 4)], ids=["A2", "A3", "950"])
def test_what_block_sparse_attention_is_given(monkeypatch, calls, chip, precise):
    call_once(monkeypatch, some_plan(block=(64, 128), dim=80), chip)
    ((operator, given),) = calls
    mask = given.pop("block_sparse_mask")
    tensors = {name: given.pop(name) for name in ("query", "key", "value")}
    assert operator == BLOCK_SPARSE
    assert (mask.dtype, mask.shape) == (torch.int8, (2, 4, 5, 3))
    assert [x.shape for x in tensors.values()] == [(2, 4, 300, 128), (2, 2, 300, 128), (2, 2, 300, 128)]
    assert all(not x[..., 80:].any() for x in tensors.values())
    assert given == {
        "block_shape": [64, 128],
        "q_input_layout": "BNSD",
        "kv_input_layout": "BNSD",
        "num_key_value_heads": 2,
        "scale_value": 80**-0.5,  # that of the head dim before padding
        "inner_precise": precise,
        "actual_seq_lengths": [300, 300],
        "actual_seq_lengths_kv": [300, 300],
        "softmax_lse_flag": 0,
    }


def test_the_dense_mask_is_true_where_tokens_are_left_out(monkeypatch, calls):
    call_once(monkeypatch, some_plan(block=(32, 64)))
    ((operator, given),) = calls
    assert operator == FUSION
    assert (given["head_num"], given["input_layout"], given["sparse_mode"], given["scale"]) == (4, "BNSD", 1, 64**-0.5)
    mask = given["atten_mask"]
    assert (mask.dtype, mask.shape) == (torch.bool, (2, 4, 300, 300))
    assert mask.float().mean() == pytest.approx(0.5, abs=0.03)
    assert all(given[name] is None for name in ("pse", "padding_mask", "prefix", "actual_seq_qlen", "dropout_mask"))


def test_dense_plans_have_no_mask(monkeypatch, calls):
    planned = plan(AttentionProblem(1, 2, 300, 300, 200, "float16"), policy=TopK(0.0))
    call_once(monkeypatch, planned)
    ((operator, given),) = calls
    assert (operator, given["atten_mask"], given["sparse_mode"]) == (FUSION, None, 0)


def test_summaries_are_a_second_attention_in_float32(monkeypatch, calls):
    call_once(monkeypatch, some_plan(omitted="summary", length=320))
    (first, kept), (second, means) = calls
    assert (first, second) == (BLOCK_SPARSE, FUSION)
    assert kept["softmax_lse_flag"] == 1
    assert {means[name].dtype for name in ("query", "key", "value", "pse")} == {torch.float32}
    assert means["key"].shape == (2, 2, 3, 64)
    assert means["scale"] == 1.0  # the bias is scaled with the logits, so the queries are scaled before
    torch.testing.assert_close(means["query"], kept["query"].float() / 8)
    assert means["pse"].shape == (2, 4, 1, 3)
    np.testing.assert_allclose(means["pse"][0, 0, 0], np.log([128, 128, 64]), rtol=1e-6)
    left_out = means["atten_mask"]
    assert left_out.shape == (2, 4, 320, 3)
    assert torch.equal(left_out[:, :, ::128], kept["block_sparse_mask"].bool())


def test_summaries_in_parts_give_the_same(monkeypatch, calls):
    (case,) = cases("summary_of_ragged_blocks")
    whole = target(monkeypatch).under(case, case.mask(), lse=True)
    monkeypatch.setattr(lowering, "LARGEST_PART", 1)
    parts = target(monkeypatch).under(case, case.mask(), lse=True)
    assert [operator for operator, _ in calls] == [BLOCK_SPARSE, FUSION, BLOCK_SPARSE, *[FUSION] * 6]
    np.testing.assert_allclose(parts["%out"], whole["%out"], atol=1e-6)
    np.testing.assert_allclose(parts["%lse"], whole["%lse"], atol=1e-6)


@pytest.mark.parametrize(
    "case",
    cases(
        *("text_at_the_end", "less_than_a_block", "batch", "one_key_head", "more_keys", "order_on_the_keys"),
        *("head_dim_24", "blocks_of_32", "long_query_blocks", "all_together", "dense", "summary_of_ragged_blocks"),
        *("large_logits", "poisoned_block_masked_out", "poisoned_block_in_a_video", "nan_query"),
    ),
    ids=str,
)
def test_cases_are_right_on_the_dense_mask_alone(monkeypatch, case):
    check(target(monkeypatch, A2, by_name(FUSION)), case)


@pytest.mark.parametrize("case", cases("video", "all_together", "head_dim_80", "poisoned_block_masked_out"), ids=str)
def test_cases_are_right_on_the_block_mask_alone(monkeypatch, case):
    check(target(monkeypatch, A2, by_name(BLOCK_SPARSE)), case)


def check(on, case):
    mask = None if case.plan().is_dense else case.mask()
    got, right = on.under(case, mask, lse=True), expected(case, mask)
    np.testing.assert_allclose(got["%out"], right.out, rtol=0, atol=right.out_limit)
    np.testing.assert_allclose(got["%lse"], right.lse, rtol=0, atol=right.lse_limit)


def test_each_tensor_is_put_in_order_once(monkeypatch):
    (case,) = cases("text_at_the_end")
    on = target(monkeypatch)
    ordered = []
    index_select = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda x, *a: ordered.append(x.shape) or index_select(x, *a))
    on.run(case, case.plan(returns=("%out", "%mask")))
    assert len(ordered) == 4  # q, k and v on the way in, the output on the way back
    ordered.clear()
    given_order = replace(case, order="given")
    on.run(given_order, given_order.plan(returns=("%out", "%mask")))
    assert not ordered


def test_the_executable_says_which_operator_attends(monkeypatch):
    lowered = target(monkeypatch).lower(some_plan())
    assert str(lowered).endswith(f"block_mean + block_mean + block_score + select + attend  (attend by {BLOCK_SPARSE})")
    assert {step.by for step in lowered.steps} == {"torch_npu"}


def objections(monkeypatch, planned, chip=A2):
    return target(monkeypatch, chip).backend.objections(planned, CPU)


def test_beyond_the_memory_cap_every_operator_says_why_not(monkeypatch):
    planned = some_plan(block=(64, 64), length=75_600, heads=40, kv_heads=40, batch=1)
    reasons = objections(monkeypatch, planned)
    assert reasons == [
        f"{BLOCK_SPARSE}: no key blocks of 64 (multiples of 128)",
        "mindiesd::block_sparse_attention: no key blocks of 64 (multiples of 128)",
        "mindiesd::rainfusionattention: no key blocks of 64 (multiples of 128)",
        f"{FUSION}: its mask, token by token, would take 212.9 GiB (at most 2 GiB)",
    ]
    with pytest.raises(LoweringError, match=r"212\.9 GiB"):
        lower(planned, target(monkeypatch).backend, CPU, strict=True)


@pytest.mark.parametrize(
    ("planned", "reason"),
    [
        (some_plan(dim=800), "no head dim 800 (at most 768)"),
        (plan(AttentionProblem(1, 300, 300, 300, 64, "float16"), policy=TopK(0.0)), "no 300 heads (at most 256)"),
        (
            plan(AttentionProblem(1, 1, 2**21, 300, 64, "float16"), policy=TopK(0.0)),
            "no 2097152 tokens (at most 1048576)",
        ),
        (
            some_plan(heads=300, kv_heads=300, omitted="summary"),
            "no omitted='summary': npu::npu_fusion_attention: no 300 heads (at most 256)",
        ),
        (some_plan(dtype="float32"), "no dtype float32 (it has bfloat16, float16)"),
    ],
    ids=["head dim", "heads", "tokens", "summary", "dtype"],
)
def test_limits(monkeypatch, planned, reason):
    assert any(reason in said for said in objections(monkeypatch, planned))


@pytest.mark.parametrize(
    ("chip", "why"),
    [(A2, "none is documented"), (ASCEND_950, "MindIE-SD's for precision int8 and fp8 are not lowered to yet")],
    ids=["A2", "950"],
)
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_attention_in_8_bits_is_declined_with_the_reason(monkeypatch, chip, why, precision):
    (reason,) = objections(monkeypatch, quantised(some_plan(), precision), chip)
    assert reason == (f"no operator for attention in 8 bits on chip {chip.name}: {why}; backend='torch' emulates it")


def test_plans_that_return_only_the_mask_need_no_operator(monkeypatch):
    monkeypatch.setattr(operators, "OPERATORS", ())
    assert objections(monkeypatch, some_plan(returns=("%mask",), block=(64, 64), length=75_600)) == []


def without(*operators_gone):
    """`operators._operator` as on a CANN that lacks some functions: they are registered, and fail when called."""
    real = operators._operator

    def lacking(operator):
        found = real(operator)
        if operator not in operators_gone:
            return found

        class Gone:
            _schema = found._schema

            def __call__(self, **arguments):
                name = "aclnnSome"
                raise RuntimeError(f"{name} or {name}GetWorkspaceSize not in libopapi.so, or libopapi.so not found.")

        return Gone()

    return lacking


def test_a_missing_function_gives_way_to_the_next_operator_once_and_says_so(monkeypatch, calls):
    (case,) = cases("video")
    on = target(monkeypatch)
    lowered = on.lower(case.plan(policy=Fixed()))
    tensors, mask = on.tensors(case), on.mask(case.mask())
    right = on.backend.to_host(lowered(*tensors, mask=mask))
    monkeypatch.setattr(operators, "_operator", without(BLOCK_SPARSE))
    with pytest.warns(RainfusionWarning, match=f"{BLOCK_SPARSE}: the installed CANN lacks it .*using {FUSION} instead"):
        stepped = on.backend.to_host(lowered(*tensors, mask=mask))
    np.testing.assert_allclose(stepped, right, atol=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(*tensors, mask=mask)
    assert [operator for operator, _ in calls] == [BLOCK_SPARSE, FUSION, FUSION]
    assert f"attend by {FUSION}" in str(lowered)


def test_the_last_operator_missing_is_an_error_with_every_reason(monkeypatch):
    (case,) = cases("video")
    on = target(monkeypatch)
    lowered, tensors = on.lower(case.plan()), on.tensors(case)
    monkeypatch.setattr(operators, "_operator", without(BLOCK_SPARSE, FUSION))
    with pytest.warns(RainfusionWarning), pytest.raises(LoweringError, match=r"lacks it.*not installed.*lacks it"):
        lowered(*tensors)
    assert len(on.backend.objections(case.plan(), CPU)) == 4  # chosen no more
    assert "lacks it" in str(lowered)


def test_summaries_need_fusion_attention(monkeypatch):
    (case,) = cases("summary")
    on = target(monkeypatch)
    lowered, tensors = on.lower(case.plan()), on.tensors(case)
    monkeypatch.setattr(operators, "_operator", without(FUSION))
    with pytest.raises(BackendUnavailableError, match=f"{FUSION}: the installed CANN lacks it"):
        lowered(*tensors)
    (reason,) = on.backend.objections(case.plan(), CPU)
    assert reason.startswith(f"no omitted='summary': {FUSION}: the installed CANN lacks it")


def test_other_errors_are_not_taken_for_a_missing_function(monkeypatch):
    (case,) = cases("video")
    on = target(monkeypatch)
    lowered, tensors = on.lower(case.plan()), on.tensors(case)

    def out_of_memory(**arguments):
        raise RuntimeError("NPU out of memory")

    out_of_memory._schema = operators._operator(BLOCK_SPARSE)._schema
    monkeypatch.setattr(operators, "_operator", lambda operator: out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        lowered(*tensors)
    assert operators._lacking == {}


def test_chips_by_their_numbers():
    found = {soc: chip.name for soc in range(1000) if (chip := chip_of(soc))}
    assert found == {**dict.fromkeys(range(220, 226), "A2"), **dict.fromkeys(range(250, 256), "A3"), 260: "950"}


def test_an_unknown_chip_is_named(monkeypatch):
    class Old:
        class npu:
            @staticmethod
            def get_soc_version():
                return 104

    monkeypatch.setattr(detection, "torch_npu", lambda: Old)
    detection.chip.cache_clear()
    with pytest.raises(BackendUnavailableError, match=r"SoC number is 104.*A2 \(220 to 225\), A3 \(250 to 255\), 950"):
        detection.chip()


def test_nothing_not_finite_goes_to_the_dense_kernel(monkeypatch, calls):
    (case,) = cases("poisoned_block_masked_out")
    target(monkeypatch, A2, by_name(FUSION)).under(case, case.mask(), lse=True)
    assert all(given[name].isfinite().all() for _, given in calls for name in ("key", "value"))


@pytest.mark.parametrize("where", ["key", "value"])
def test_rows_that_attend_to_a_bad_number_are_spoiled_and_no_others(monkeypatch, where):
    on = target(monkeypatch, A2, by_name(FUSION))
    q, k, v = (torch.randn(1, 1, 96, 16).half() for _ in range(3))
    (k if where == "key" else v)[0, 0, 40, 3] = torch.nan
    mask = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)[None, None]
    planned = plan(
        AttentionProblem(1, 1, 96, 96, 16, "float16"), TokenLayout(block=32), Fixed(), returns=("%out", "%lse")
    )
    out, lse = on.lower(planned)(q, k, v, mask=BlockMask(mask, 96, 96, (32, 32)))
    bad_rows = torch.arange(96) >= 32
    bad = bad_rows[:, None] & (torch.ones(16, dtype=torch.bool) if where == "key" else torch.arange(16) == 3)
    assert torch.equal(out[0, 0].isnan(), bad)
    assert torch.equal(lse[0, 0].isnan(), bad_rows if where == "key" else torch.zeros(96, dtype=torch.bool))


def test_the_limit_of_the_dense_mask_is_in_bytes(monkeypatch):
    planned = some_plan(block=(64, 64), batch=1, heads=2, kv_heads=2)
    assert objections(monkeypatch, planned) == []
    monkeypatch.setattr(operators, "LARGEST_MASK", 2 * 300 * 300 - 1)
    assert len(objections(monkeypatch, planned)) == 4


# -- dense rows by a dense operator ---------------------------------------------------------------------


def split_plan(**how):
    layout = TokenLayout((3, 16, 16), text=70, window=(1, 8, 16))
    return plan(AttentionProblem(2, 4, 838, 838, 64, "float16", 2), layout, TopK(0.5), **how)


@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_dense_rows_by_the_dense_operator(monkeypatch, calls, omitted):
    monkeypatch.setattr(lowering, "seconds_saved", lambda problem, rows: 1.0)
    on, planned = target(monkeypatch), split_plan(omitted=omitted, returns=("%out", "%lse"))
    q, k, v = tensors(planned)
    split = on.lower(planned)(q, k, v)
    (first, sparse), (second, dense) = calls[:2]
    assert (first, second) == (BLOCK_SPARSE, FUSION)
    assert (sparse["query"].shape[2], dense["query"].shape[2]) == (512, 326)
    assert sparse["block_sparse_mask"].shape == (2, 4, 4, 7)
    assert (sparse["actual_seq_lengths"], sparse["actual_seq_lengths_kv"]) == ([512, 512], [838, 838])
    assert dense["atten_mask"] is None
    assert f"attend by {BLOCK_SPARSE}, the last 326 rows by {FUSION}, which is estimated" in str(on.lower(planned))
    monkeypatch.setattr(lowering, "seconds_saved", lambda problem, rows: 0.0)
    whole = on.lower(planned)(q, k, v)
    for one, other in zip(split, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


@pytest.mark.parametrize("lacking", [(FUSION,), (BLOCK_SPARSE,)], ids=str)
def test_rows_are_not_split_where_an_operator_turns_out_to_be_missing(monkeypatch, lacking):
    monkeypatch.setattr(lowering, "seconds_saved", lambda problem, rows: 1.0)
    on, planned = target(monkeypatch), split_plan()
    lowered, qkv = on.lower(planned), tensors(planned)
    right = lowered(*qkv)
    monkeypatch.setattr(operators, "_operator", without(*lacking))
    with pytest.warns(RainfusionWarning, match="lacks it"):
        torch.testing.assert_close(lowered(*qkv), right, rtol=0, atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(*qkv)
    assert "the last" not in str(lowered)


def test_when_splitting_is_estimated_to_pay():
    def saved(grid, dim=128, heads=40):
        tokens = math.prod(grid)
        problem = AttentionProblem(1, heads, tokens, tokens, dim, "bfloat16")
        return lowering.seconds_saved(problem, grid[1] * grid[2])

    assert saved((21, 45, 80)) == pytest.approx(2.7e-3, rel=0.01)  # a clip of 720p: 3600 rows over 75 600 keys
    assert saved((3, 16, 16)) < 0


def test_rows_that_may_not_be_dense_are_not_split(monkeypatch):
    monkeypatch.setattr(lowering, "seconds_saved", lambda problem, rows: 1.0)
    on = target(monkeypatch)
    layout = TokenLayout((3, 16, 16), text=70, window=(1, 8, 16))
    problem = AttentionProblem(2, 4, 838, 838, 64, "float16", 2)
    for how in ({"policy": Fixed()}, {"policy": TopK(0.5), "kv_lengths": True}, {"policy": TopK(0.0)}):
        assert "the last" not in str(on.lower(plan(problem, layout, **how)))


# -- selection on the chip ----------------------------------------------------------------------------------


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a number back to the host, and what has a shape that depends on data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_nothing_waits_for_the_device(monkeypatch, case):
    """From tokens to the output; lengths, which operators take as numbers, are on the host in these cases."""
    on, planned = target(monkeypatch), case.plan(returns=("%out", "%mask"))
    lowered, qkv = on.lower(planned), on.tensors(case)
    given = case.operands(planned)
    if planned.takes("%mask"):
        given["mask"] = on.mask(case.mask())
    with NoWaiting():
        lowered(*qkv, **given)


@pytest.mark.parametrize(
    "waits", [lambda x: x.sum().item(), lambda x: bool(x.any()), torch.nonzero, lambda x: x[x > 0], torch.unique]
)
def test_what_waits_is_refused(waits):
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        waits(torch.ones(3))


# -- operands given at call time, rows without keys, programs of others ------------------------------

LIMITS = {"%out": 2e-2, "%lse": 1e-4}


def tensors(planned):
    torch.manual_seed(0)
    p = planned.problem
    return [torch.randn(shape).to(getattr(torch, p.dtype)) for shape in (p.q_shape, p.kv_shape, p.kv_shape)]


def check_plan(on, planned, q, k, v, **operands):
    """Output and log-sum-exp of a plan against the definitions in float64."""
    results = on.lower(planned)(q, k, v, **operands)
    wide = Plan.from_json(planned.to_json().replace(f'"{planned.problem.dtype}"', '"float64"'))
    given = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in operands.items()}
    if "mask" in given:
        given["mask"] = BlockMask(
            given["mask"].blocks.numpy(), planned.problem.q_len, planned.problem.kv_len, planned.block
        )
    right = lower(wide, ReferenceBackend(), CPU)(*(x.double().numpy() for x in (q, k, v)), **given)
    for name, got, want in zip(planned.returns, results, right, strict=True):
        torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=0, atol=LIMITS[name])
    return results


def video(*, policy, block=(64, 128), **how):
    layout = TokenLayout((3, 8, 16), text=70, text_position="start", block=block, sink="first_frame_keys")
    return plan(AttentionProblem(2, 4, 454, 454, 64, "float16", 2), layout, policy, returns=("%out", "%lse"), **how)


@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("policy", [TopK(0.3), TopK(0.0), Fixed()], ids=str)
@pytest.mark.parametrize("only", [(), (FUSION,)], ids=["block mask", "token mask"])
def test_tokens_beyond_a_samples_length_take_no_part(monkeypatch, calls, omitted, policy, only):
    on = target(monkeypatch, A2, *map(by_name, only))
    planned = video(policy=policy, omitted=omitted, kv_lengths=True)
    q, k, v = tensors(planned)
    lengths = torch.tensor([454, 391], dtype=torch.int32)
    order = planned.layout.order.copy()
    k[1, :, order[391:]], v[1, :, order[391:]] = math.nan, math.inf
    operands = {}
    if policy == Fixed():
        blocks = torch.rand(2, 4, 8, 4) < 0.6
        blocks[0, 0, 2], blocks[1, 1, 3, :3] = False, False  # nothing, and nothing but padding
        operands["mask"] = BlockMask(blocks, 454, 454, planned.block)
    if policy == TopK(0.3):  # the mask of float64 scores could differ
        lowered = on.lower(replace(planned, returns=("%mask",)))
        operands["mask"] = lowered(q, k, v, kv_lengths=lengths)
        planned = video(policy=Fixed(), omitted=omitted, kv_lengths=True)
    out, lse = check_plan(on, planned, q, k, v, kv_lengths=lengths, **operands)
    assert not out[1, :, order[391:]].any()
    assert (lse[1, :, order[391:]] == -math.inf).all()
    first = FUSION if only else BLOCK_SPARSE
    assert {operator for operator, _ in calls} == {first} | (
        {FUSION} if omitted == "summary" and policy != TopK(0.0) else set()
    )
    assert f"attend by {first}" in str(on.lower(planned))


def test_what_block_sparse_attention_is_given_for_padded_samples(monkeypatch, calls):
    on = target(monkeypatch)
    planned = plan(AttentionProblem(3, 2, 300, 300, 64, "float16"), TokenLayout(block=128), Fixed(), kv_lengths=True)
    q, k, v = tensors(planned)
    blocks = torch.ones((3, 2, 3, 3), dtype=torch.bool)
    blocks[1, 0, 0] = torch.tensor([False, True, False])  # beyond what that sample has
    lengths = torch.tensor([0, 90, 999], dtype=torch.int32)
    on.lower(planned)(q, k, v, mask=BlockMask(blocks, 300, 300, (128, 128)), kv_lengths=lengths)
    ((operator, given),) = calls
    assert operator == BLOCK_SPARSE
    assert given["actual_seq_lengths"] == given["actual_seq_lengths_kv"] == [1, 90, 300]
    assert given["block_sparse_mask"][:, 0].tolist() == [[[1, 0, 0]] * 3, [[1, 0, 0]] * 3, [[1, 1, 1]] * 3]


@pytest.mark.parametrize(
    "given", [np.array([40, 300]), [40, 300], torch.tensor([40, 300], dtype=torch.int32)], ids=type
)
def test_lengths_are_read_back_only_where_they_are_on_the_device(monkeypatch, given):
    on = target(monkeypatch)
    planned = plan(AttentionProblem(2, 2, 300, 300, 64, "float16"), TokenLayout(block=128), kv_lengths=True)
    lowered, qkv = on.lower(planned), tensors(planned)
    read = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: read.append(tuple(x.shape)) or cpu(x))
    lowered(*qkv, kv_lengths=given)
    assert read.count((2,)) == isinstance(given, torch.Tensor)


def test_padded_samples_of_any_size_have_an_operator(monkeypatch):
    """Dense ones too: all blocks are in the mask, and the lengths say the rest."""
    for policy in (TopK(0.5), TopK(0.0)):
        problem = AttentionProblem(1, 40, 75_600, 75_600, 128, "bfloat16")
        planned = plan(problem, TokenLayout(block=128), policy, kv_lengths=True)
        assert objections(monkeypatch, planned) == []


@pytest.mark.parametrize("operator", [BLOCK_SPARSE, FUSION])
@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_rows_of_a_given_mask_that_keep_nothing(monkeypatch, operator, omitted):
    on = target(monkeypatch, A2, by_name(operator))
    planned = video(policy=Fixed(), omitted=omitted)
    blocks = torch.rand(2, 4, 8, 4) < 0.6
    blocks[..., 1] = True
    blocks[0, 0, 2], blocks[1, 3, 7] = False, False
    q, k, v = tensors(planned)
    out, lse = check_plan(on, planned, q, k, v, mask=BlockMask(blocks, 454, 454, planned.block))
    assert out.isfinite().all()
    if omitted == "drop":
        assert (lse == -math.inf).sum() == 64 + 454 - 7 * 64


def test_quotas_at_call_time_may_leave_rows_empty(monkeypatch):
    on = target(monkeypatch)
    planned = plan(
        AttentionProblem(1, 2, 300, 300, 64, "float16"), TokenLayout(block=128), quotas=True, returns=("%out", "%lse")
    )
    q, k, v = tensors(planned)
    out, lse = on.lower(planned)(q, k, v, quotas=np.array([[0, 1, 2], [3, 9, 0]], dtype=np.int32))
    assert torch.equal(lse[0, 0] == -math.inf, torch.arange(300) < 128)
    assert torch.equal(lse[0, 1] == -math.inf, torch.arange(300) >= 256)
    assert torch.equal((out == 0).all(dim=-1), lse == -math.inf)


def test_every_head_has_a_share_of_its_own(monkeypatch, calls):
    call_once(monkeypatch, plan(AttentionProblem(1, 2, 640, 640, 64, "float16"), policy=TopK((0.2, 0.8))))
    mask = calls[0][1]["block_sparse_mask"]
    assert mask.sum(dim=(0, 2, 3)).tolist() == [20, 5]


@dataclass(frozen=True, kw_only=True)
class Negated(Op):
    """An operation that no kernel knows."""

    name: ClassVar[str] = "test_npu_negated"
    x: str = operand()
    negative: str = result()

    def meaning(self, x):
        return -x


@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_an_operation_that_no_kernel_knows_is_neither_claimed_nor_dropped(monkeypatch, calls, omitted):
    on = target(monkeypatch)
    planned = some_plan(omitted=omitted, length=640, block=(128, 128))
    ops = list(planned.ops)
    at = next(i for i, op in enumerate(ops) if "%score" in op.makes)
    ops[at] = replace(ops[at], score="%raw")
    ops.insert(at + 1, Negated(x="%raw", negative="%score"))
    changed = on.lower(replace(planned, ops=tuple(ops), returns=("%out", "%mask")))
    by = {op.name: step.by for step in changed.steps for op in step.segment.ops}
    assert (by["test_npu_negated"], by["select"], by["attend"]) == ("definition", "torch_npu", "torch_npu")
    q, k, v = tensors(planned)
    _, mask = changed(q, k, v)
    opposite = on.lower(replace(planned, returns=("%out", "%mask")))(-q, k, v)[1]
    assert torch.equal(mask.blocks, opposite.blocks)
    attended = calls[0][1]["block_sparse_mask"]
    assert torch.equal(attended.bool(), mask.blocks)


def test_values_of_the_mask_chain_and_between_attentions_can_be_returned(monkeypatch):
    on = target(monkeypatch)
    returns = ("%out", "%qb", "%kb", "%score", "%mask", "%kept", "%rest_lse")
    planned = replace(some_plan(omitted="summary", length=320), returns=returns)
    lowered = on.lower(planned)
    assert [step.by for step in lowered.steps] == ["torch_npu"]
    q, k, v = tensors(planned)
    got = dict(zip(returns, lowered(q, k, v), strict=True))
    reference = lower(planned, ReferenceBackend(), CPU)(q, k, v)
    for name, right in zip(returns, reference, strict=True):
        if name == "%mask":
            assert torch.equal(got[name].blocks, right.blocks)
        else:
            torch.testing.assert_close(got[name].float(), right.float(), rtol=0, atol=2e-2)
