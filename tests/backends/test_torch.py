"""The torch backend: what is its own, beside the conformance kit that every backend passes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rainfusion
from rainfusion.backends.reference import ReferenceBackend
from rainfusion.backends.torch import blocks as torch_blocks
from rainfusion.backends.torch import kept, softmax
from rainfusion.backends.torch.backend import TorchBackend
from rainfusion.backends.torch.blocks import bucket
from rainfusion.core.backend import Device
from rainfusion.core.errors import NoBackendError, SparsityWarning
from rainfusion.core.layout import TokenLayout
from rainfusion.core.lowering import lower
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import Attend, Op, operand, result
from rainfusion.core.plan import Plan
from rainfusion.core.planner import plan
from rainfusion.core.policies import Fixed, TopK, TopP
from rainfusion.core.problem import AttentionProblem

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tensors(q_shape, kv_shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (q_shape, kv_shape, kv_shape)]


def random_mask(q, k, block, seed=0, density=0.4):
    generator = torch.Generator().manual_seed(seed)
    grid = (*q.shape[:2], -(-q.shape[2] // block[0]), -(-k.shape[2] // block[1]))
    blocks = torch.rand(grid, generator=generator) < density
    blocks[..., 0] |= ~blocks.any(-1)
    return BlockMask.from_bool(blocks, q.shape[2], k.shape[2], block)


def on_both(q, k, v, **how):
    """The same call on the torch backend and, in float64, on the reference."""
    got = rainfusion.attention(q, k, v, backend="torch", **how)
    want = rainfusion.attention(q.double(), k.double(), v.double(), backend="reference", **how)
    return got, want


def assert_close(got, want, dtype):
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=TOLERANCE[dtype])


@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    q_len=st.integers(1, 90),
    kv_len=st.integers(1, 90),
    dim=st.integers(1, 24),
    block=st.tuples(st.sampled_from([1, 8, 16, 24]), st.sampled_from([1, 8, 16, 24])),
    dtype=st.sampled_from(list(TOLERANCE)),
    omitted=st.sampled_from(["drop", "summary"]),
    lse=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_given_mask(batch, kv_heads, group, q_len, kv_len, dim, block, dtype, omitted, lse, seed):
    q, k, v = tensors((batch, kv_heads * group, q_len, dim), (batch, kv_heads, kv_len, dim), dtype, seed)
    mask = random_mask(q, k, block, seed)
    got, want = on_both(q, k, v, mask=mask, block=block, omitted=omitted, return_lse=lse)
    if lse:
        (got, got_lse), (want, want_lse) = got, want
        assert got_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got_lse.double(), want_lse, rtol=0, atol=4e-6)
    assert got.dtype == dtype
    assert_close(got, want, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("policy", [TopK(0.5), TopP(0.7)])
@pytest.mark.parametrize("kv_len", [5 * 6 * 7 + 5, 100])
def test_grids_with_text_and_ragged_blocks(dtype, omitted, policy, kv_len):
    q, k, v = tensors((2, 2, 5 * 6 * 7 + 5, 16), (2, 1, kv_len, 16), dtype)
    how = {"grid": (5, 6, 7), "text": 5, "block": (8, 16), "omitted": omitted}
    _, mask = rainfusion.attention(q, k, v, backend="torch", policy=policy, return_mask=True, **how)
    got = rainfusion.attention(q, k, v, backend="torch", policy=policy, **how)
    want = rainfusion.attention(q.double(), k.double(), v.double(), backend="reference", mask=mask, **how)
    assert_close(got, want, dtype)


def test_rows_of_equal_count_share_a_bucket_and_dense_rows_are_left_out():
    counts = np.full((1, 4, 6), 2)
    counts[:, :, 4:] = 4
    counts[0, 3, 0] = 3
    rows = bucket(counts, 2, 4, torch.device("cpu"))
    assert rows.dense_from == 4
    assert [(same.width, len(same.rows)) for same in rows.buckets] == [(2, 15), (3, 1)]
    assert rows.buckets[1].rows.tolist() == [3 * 6]
    assert rows.buckets[1].first_block.tolist() == [4]  # query head 3 reads key head 1, which starts at block 4


def test_topk_reads_no_counts_back(monkeypatch):
    q, k, v = tensors((1, 2, 160, 8), (1, 2, 160, 8))
    monkeypatch.setattr(kept, "counts_of", lambda mask: pytest.fail("the plan knows the counts"))
    rainfusion.attention(q, k, v, block=16, sparsity=0.5, backend="torch")


@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_nan_in_a_skipped_block_stays_there(omitted):
    q, k, v = tensors((1, 1, 64, 8), (1, 1, 72, 8))
    k[0, 0, 16:32], v[0, 0, 16:32] = torch.nan, torch.nan
    blocks = torch.ones((1, 1, 4, 5), dtype=torch.bool)
    blocks[0, 0, :2, 1] = False
    blocks[0, 0, 0, 3] = False
    mask = BlockMask.from_bool(blocks, 64, 72, (16, 16))
    # With "summary" it is the other way round: the mean of the block is read where the block is skipped.
    out = rainfusion.attention(q, k, v, mask=mask, block=16, omitted=omitted, backend="torch")
    clean = out.isfinite().all(dim=-1)[0, 0].view(4, 16).all(dim=-1)
    assert clean.tolist() == ([True, True, False, False] if omitted == "drop" else [False] * 4)
    # NaN behind the ragged last block, in memory the tensors only view, is not read either.
    padded = torch.full((1, 1, 80, 8), torch.nan)
    padded[:, :, :72] = k.nan_to_num()
    whole = rainfusion.attention(q, padded[:, :, :72], padded[:, :, :72], mask=mask, block=16, backend="torch")
    assert whole.isfinite().all()


def lowered(q, k, block, **how):
    """A fresh executable for a given mask, past the caches, so that patched limits hold."""
    returns = ("%out", "%lse") if how.pop("return_lse", False) else ("%out",)
    made = plan(AttentionProblem.from_tensors(q, k, k), TokenLayout(block=block), Fixed(), returns=returns, **how)
    return lower(made, TorchBackend(), Device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"return_lse": True}, {"omitted": "summary"}], ids=str)
def test_one_row_at_a_time_gives_the_same(monkeypatch, dtype, how):
    q, k, v = tensors((2, 4, 200, 16), (2, 2, 136, 16), dtype)
    mask = random_mask(q, k, (16, 16))
    whole = lowered(q, k, 16, **how)(q, k, v, mask=mask)
    rows = []
    monkeypatch.setattr(kept, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(kept, "gather", lambda x, at, *rest: rows.append(len(at)) or torch_blocks.gather(x, at, *rest))
    cut = lowered(q, k, 16, **how)(q, k, v, mask=mask)
    assert set(rows) == {1}
    torch.testing.assert_close(whole, cut, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_stays_within_the_limit(monkeypatch, dtype):
    q, k, v = tensors((1, 2, 2048, 32), (1, 2, 2048, 32), dtype)
    mask = random_mask(q, k, (64, 64), density=0.2)
    taken = {}
    take = torch_blocks.Scratch.take

    def watched(self, use, shape, dtype):
        made = take(self, use, shape, dtype)
        taken[use] = max(taken.get(use, 0), made.numel() * made.element_size())
        return made

    monkeypatch.setattr(kept, "CPU_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(torch_blocks.Scratch, "take", watched)
    lowered(q, k, 64)(q, k, v, mask=mask)
    assert 1 << 18 < sum(taken.values()) <= 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lse", [False, True])
def test_dense_in_runs_of_queries(monkeypatch, dtype, lse):
    q, k, v = tensors((2, 4, 70, 16), (2, 2, 50, 16), dtype)
    monkeypatch.setattr(softmax, "CPU_SCORE_BYTES", 50 * 4 * 2 * 9)
    got, want = on_both(q, k, v, sparsity=0.0, return_lse=lse)
    assert_close(got[0] if lse else got, want[0] if lse else want, dtype)
    if lse:
        torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_numpy_in_numpy_out(name):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    tensor = getattr(torch, name)
    q, k, v = tensors((1, 2, 100, 8), (1, 2, 100, 8), tensor)
    arrays = [x.double().numpy().astype(dtype) for x in (q, k, v)]
    for x in arrays:
        x.flags.writeable = False
    out, mask = rainfusion.attention(*arrays, block=16, sparsity=0.5, return_mask=True, backend="torch")
    same = rainfusion.attention(q, k, v, block=16, sparsity=0.5, backend="torch")
    assert isinstance(out, np.ndarray)
    assert isinstance(mask.blocks, np.ndarray)
    assert out.dtype == dtype
    np.testing.assert_allclose(out.astype(np.float64), same.double().numpy(), rtol=0, atol=TOLERANCE[tensor])


def test_bshd_is_read_in_place_and_inputs_are_left_alone():
    backend = TorchBackend()
    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors((2, 3, 130, 8), (2, 3, 130, 8)))
    assert backend.to_native(q).data_ptr() == q.data_ptr()
    array = q.numpy()
    assert backend.to_native(array).data_ptr() == q.data_ptr()
    before = [x.clone() for x in (q, k, v)]
    how = {"grid": (5, 2, 13), "block": 16, "sparsity": 0.4, "backend": "torch"}
    out = rainfusion.attention(q, k, v, tensor_layout="bshd", **how)
    straight = rainfusion.attention(*(x.transpose(1, 2) for x in (q, k, v)), **how)
    assert out.shape == q.shape
    torch.testing.assert_close(out.transpose(1, 2), straight)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("view", ["every other channel", "channels first"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("lse", [False, True])
def test_channels_need_not_be_neighbours(view, sparsity, lse):
    if view == "channels first":
        q, k, v = (x.mT for x in tensors((1, 2, 8, 70), (1, 2, 8, 50)))
    else:
        q, k, v = (x[..., ::2] for x in tensors((1, 2, 70, 16), (1, 2, 50, 16)))
    got, want = on_both(q, k, v, block=16, sparsity=sparsity, return_lse=lse)
    for made, true in zip(got, want, strict=True) if lse else [(got, want)]:
        assert_close(made, true, q.dtype)


def test_numpy_views_that_run_backwards_are_read_as_they_are():
    q = np.random.default_rng(0).standard_normal((1, 1, 64, 8), np.float32)[:, :, ::-1]
    got = rainfusion.attention(q, q, q, block=16, sparsity=0.5, backend="torch")
    want = rainfusion.attention(q, q, q, block=16, sparsity=0.5, backend="reference")
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_tensors_without_data_are_on_no_device_of_ours():
    q = torch.empty((1, 1, 64, 8), device="meta")
    with pytest.raises(NoBackendError, match="meta"):
        rainfusion.attention(q, q, q, block=16, sparsity=0.5)


def test_autocast_lowers_the_precision_of_neither_scores_nor_output():
    q, k, v = tensors((1, 2, 512, 16), (1, 2, 512, 16))
    how = {"block": 16, "sparsity": 0.8, "return_mask": True, "backend": "torch"}
    with torch.autocast("cpu", torch.bfloat16):
        inside, chosen = rainfusion.attention(q, k, v, **how)
    out, mask = rainfusion.attention(q, k, v, **how)
    assert torch.equal(chosen.blocks, mask.blocks)
    torch.testing.assert_close(inside, out)


@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_attention_is_never_left_to_the_definitions(omitted, sparsity):
    made = plan(AttentionProblem(1, 1, 64, 64, 8), TokenLayout(block=16), TopK(sparsity), omitted=omitted)
    steps = rainfusion.lower(made, device="cpu", backend="torch").steps
    by = {op.name: step.by for step in steps for op in step.segment.ops}
    assert by["attend"] == by.get("merge", "torch") == "torch"


# -- lengths, empty rows, numbers that are not finite ----------------------------------------------


def definition(q, k, v, made, **operands):
    """The same plan in float64 by the definitions, on the reference backend."""
    wide = Plan.from_json(made.to_json().replace(f'"{made.problem.dtype}"', '"float64"'))
    arrays = [x.double().numpy() for x in (q, k, v)]
    if "mask" in operands:
        operands["mask"] = BlockMask(operands["mask"].blocks.numpy(), *mask_facts(operands["mask"]))
    results = lower(wide, ReferenceBackend(), Device("cpu"))(*arrays, **operands)
    return [torch.from_numpy(x) for x in (results if isinstance(results, tuple) else (results,))]


def mask_facts(mask):
    return mask.q_len, mask.kv_len, mask.block


def check(q, k, v, made, dtype, **operands):
    """Output and log-sum-exp of a plan that returns both, against the definitions in float64."""
    got = lower(made, TorchBackend(), Device("cpu"))(q, k, v, **operands)
    numbers = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in operands.items()}
    want = definition(q, k, v, made, **numbers)
    for x, right, limit in zip(got, want, (TOLERANCE[dtype], max(4e-6, TOLERANCE[dtype] / 1e3)), strict=True):
        torch.testing.assert_close(x.double(), right, rtol=0, atol=limit, equal_nan=True)
    return got


BOTH = ("%out", "%lse")


@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    text=st.integers(0, 20),
    text_position=st.sampled_from(["start", "end"]),
    kv_len=st.sampled_from([None, 70]),
    kv_heads=st.integers(1, 2),
    policy=st.sampled_from([TopK(0.5), TopK((0.2, 0.8)), TopP(0.7), TopK(0.0), Fixed()]),
    omitted=st.sampled_from(["drop", "summary"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    lse=st.booleans(),
    lengths=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
@pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning")
def test_tokens_beyond_a_samples_length_take_no_part(
    grid, text, text_position, kv_len, kv_heads, policy, omitted, dtype, lse, lengths, seed
):
    layout = TokenLayout(grid, text, text_position, block=(8, 16))
    kv_len = kv_len or layout.length
    q, k, v = tensors((2, 2, layout.length, 8), (2, kv_heads, kv_len, 8), dtype, seed)
    problem = AttentionProblem.from_tensors(q, k, v)
    returns = BOTH if lse else ("%out",)
    used = policy if policy == TopK(0.0) else Fixed()
    made = plan(problem, layout, used, omitted=omitted, returns=returns, kv_lengths=True)
    order = np.arange(kv_len) if made.find(Attend).kv_order is None else layout.order.copy()
    lengths = torch.tensor([min(n, kv_len) for n in lengths], dtype=torch.int32)
    for sample, length in enumerate(lengths.tolist()):  # what is beyond is never read
        k[sample, :, order[length:]], v[sample, :, order[length:]] = math.nan, math.inf
    mask = random_mask(q, k, layout.block, seed)
    if policy != Fixed():
        selects = plan(problem, layout, policy, omitted=omitted, returns=("%out", "%mask"), kv_lengths=True)
        mask = BlockMask(
            lower(selects, TorchBackend(), Device("cpu"))(q, k, v, kv_lengths=lengths)[1].blocks, *mask_facts(mask)
        )
    mask = {} if policy == TopK(0.0) else {"mask": mask}
    if lse:
        out, log_sums = check(q, k, v, made, dtype, kv_lengths=lengths, **mask)
    else:
        out = lower(made, TorchBackend(), Device("cpu"))(q, k, v, kv_lengths=lengths, **mask)
        numbers = {"kv_lengths": lengths.numpy(), **mask}
        want = definition(q, k, v, made, **numbers)[0]
        torch.testing.assert_close(out.double(), want, rtol=0, atol=TOLERANCE[dtype])
    assert out.isfinite().all()
    if kv_len == layout.length:
        for sample, length in enumerate(lengths.tolist()):
            assert not out[sample, :, order[length:]].any()
            assert not lse or (log_sums[sample, :, order[length:]] == -math.inf).all()


@pytest.mark.parametrize("policy", [TopK(0.5), TopK(0.0)])
def test_lengths_make_the_host_wait_for_nothing(monkeypatch, policy):
    q, k, v = tensors((2, 2, 96, 8), (2, 2, 96, 8))
    made = plan(AttentionProblem.from_tensors(q, k, v), TokenLayout(block=16), policy, kv_lengths=True)
    executable = lower(made, TorchBackend(), Device("cpu"))
    lengths = torch.tensor([96, 40], dtype=torch.int32)
    for name in ("item", "tolist", "numpy", "nonzero", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(f"{name} was called"))
    out = executable(q, k, v, kv_lengths=lengths)
    monkeypatch.undo()
    assert not out[1, :, 40:].any()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("kv_len", [64, 72])
def test_rows_of_a_made_that_keep_nothing(dtype, omitted, kv_len):
    q, k, v = tensors((1, 2, 64, 8), (1, 1, kv_len, 8), dtype)
    blocks = random_mask(q, k, (16, 16)).blocks.clone()
    blocks[0, 0, 1], blocks[0, 1, 3] = False, False
    made = plan(AttentionProblem.from_tensors(q, k, v), TokenLayout(block=16), Fixed(), omitted=omitted, returns=BOTH)
    out, lse = check(q, k, v, made, dtype, mask=BlockMask(blocks, 64, kv_len, (16, 16)))
    if omitted == "drop":
        assert not out[0, 0, 16:32].any()
        assert (lse[0, 0, 16:32] == -math.inf).all()


@pytest.mark.parametrize("count", [0, 1])
def test_quotas_given_at_call_time_may_leave_rows_empty(count):
    q, k, v = tensors((1, 2, 64, 8), (1, 2, 64, 8))
    made = plan(AttentionProblem.from_tensors(q, k, v), TokenLayout(block=16), quotas=True, returns=BOTH)
    quotas = np.array([[count, 2, 1, 4], [4, 3, count, 9]], dtype=np.int32)
    out, lse = check(q, k, v, made, torch.float32, quotas=quotas)
    assert (lse[0, 0, :16] == -math.inf).all() == (count == 0)
    assert out[0, 0, :16].any() == (count > 0)


def test_each_head_has_counts_of_its_own_and_the_host_knows_them(monkeypatch):
    q, k, v = tensors((2, 3, 160, 8), (2, 3, 160, 8))
    made = plan(AttentionProblem.from_tensors(q, k, v), TokenLayout(block=16), TopK((0.2, 0.5, 0.9)), returns=BOTH)
    assert len(made.row_counts) == 3
    monkeypatch.setattr(kept, "counts_of", lambda mask: pytest.fail("the plan knows the counts"))
    check(q, k, v, made, torch.float32)


@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    rows=st.sampled_from([1, 3, 20, 64]),
    keys=st.sampled_from([1, 5, 16, 33, 64]),
    sparse=st.booleans(),
    lse=st.booleans(),
    scale=st.sampled_from([0.25, 0.0, 1.0]),
    bad=st.lists(
        st.tuples(
            st.sampled_from("qkv"),
            st.integers(0, 63),
            st.sampled_from([math.nan, math.inf, -math.inf]),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 9),
)
@settings(max_examples=150, deadline=None)
def test_numbers_that_are_not_finite_spread_as_in_the_definition(dtype, rows, keys, sparse, lse, scale, bad, seed):
    q, k, v = tensors((1, 2, rows, 4), (1, 1, keys, 4), dtype, seed)
    for name, token, value, whole in bad:
        x = {"q": q, "k": k, "v": v}[name]
        x[:, :, token % x.shape[2], slice(None) if whole else 2] = value
    problem = AttentionProblem(1, 2, rows, keys, 4, str(dtype).removeprefix("torch."), 1, scale)
    policy = Fixed() if sparse else TopK(0.0)
    made = plan(problem, TokenLayout(block=(16, 8)), policy, returns=BOTH if lse else ("%out",))
    operands = {"mask": random_mask(q, k, (16, 8), seed, density=0.6)} if sparse else {}
    got = lower(made, TorchBackend(), Device("cpu"))(q, k, v, **operands)
    want = definition(q, k, v, made, **operands)
    for x, right in zip(got if lse else (got,), want, strict=False):
        assert torch.equal(x.isnan(), right.isnan())
        assert torch.equal(x == -math.inf, right == -math.inf)
    out = got[0] if lse else got
    finite = want[0].isfinite()
    torch.testing.assert_close(out.double()[finite], want[0][finite], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_rows_whose_logits_are_all_minus_infinity(dtype, sparsity):
    q, k, v = tensors((1, 1, 64, 8), (1, 1, 64, 8), dtype)
    q[0, 0, 7], k = -math.inf, k.abs()
    made = plan(AttentionProblem.from_tensors(q, k, v), TokenLayout(block=16), TopK(sparsity), returns=BOTH)
    out, lse = lower(made, TorchBackend(), Device("cpu"))(q, k, v)
    assert not out[0, 0, 7].any()
    assert lse[0, 0, 7] == -math.inf
    assert lse.isfinite().sum() == 63


# -- programs of others -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Halved(Op):
    """A result of half the size, an operation that no kernel knows."""

    name: ClassVar[str] = "test_torch_halved"
    x: str = operand()
    half: str = result()

    def meaning(self, x):
        return x * 0.5


@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_an_operation_that_no_kernel_knows_costs_the_others_nothing(omitted, where):
    q, k, v = tensors((1, 2, 64, 8), (1, 2, 64, 8), torch.bfloat16)
    made = plan(AttentionProblem.from_tensors(q, k, v), TokenLayout(block=16), TopK(0.5), omitted=omitted, returns=BOTH)
    ops = list(made.ops)
    at, factor = next(i for i, op in enumerate(ops) if isinstance(op, Attend)), 1.0
    last = next(op for op in reversed(ops) if "%out" in op.makes)
    if where == "before":
        ops.insert(at, Halved(x="%v", half="%v_half"))
        ops[at + 1] = replace(ops[at + 1], v="%v_half")
        factor = 0.5 if omitted == "drop" else None
    elif where == "between":
        score = next(i for i, op in enumerate(ops) if "%score" in op.makes)
        ops[score] = replace(ops[score], score="%raw")
        ops.insert(score + 1, Halved(x="%raw", half="%score"))
    else:
        ops[ops.index(last)] = replace(last, out="%whole")
        ops.append(Halved(x="%whole", half="%out"))
        factor = 0.5
    changed = replace(made, ops=tuple(ops))
    executable = lower(changed, TorchBackend(), Device("cpu"))
    by = {op.name: step.by for step in executable.steps for op in step.segment.ops}
    assert by["test_torch_halved"] == "definition"
    assert {by["attend"], by.get("merge", "torch"), by.get("attend_means", "torch")} == {"torch"}
    out, lse = executable(q, k, v)
    if factor is not None:
        plain, same_lse = lower(made, TorchBackend(), Device("cpu"))(q, k, v)
        torch.testing.assert_close(out.float(), factor * plain.float(), rtol=0, atol=TOLERANCE[torch.bfloat16])
        torch.testing.assert_close(lse, same_lse)


def test_values_between_the_two_attentions_can_be_returned():
    q, k, v = tensors((1, 2, 64, 8), (1, 2, 64, 8))
    made = plan(AttentionProblem.from_tensors(q, k, v), TokenLayout(block=16), TopK(0.5), omitted="summary")
    made = replace(made, returns=("%out", "%kept", "%rest_lse"))
    executable = lower(made, TorchBackend(), Device("cpu"))
    for x, right in zip(executable(q, k, v), definition(q, k, v, made), strict=True):
        torch.testing.assert_close(x.double(), right, rtol=0, atol=TOLERANCE[torch.float32])


def test_protection_beyond_the_budget_still_attends_to_it():
    q, k, v = tensors((1, 1, 128, 8), (1, 1, 128, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsityWarning)
        got, want = on_both(q, k, v, grid=(2, 8, 8), block=16, sparsity=0.9)
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize(
    ("device", "dtype", "length", "pays"),
    [
        ("cuda:0", "bfloat16", 8192, False),
        ("cuda:0", "bfloat16", 75600, True),
        ("cuda:0", "float32", 8192, None),
        ("cpu", "bfloat16", 8192, None),
    ],
)
def test_gathering_pays_late_in_half_precision_on_cuda(device: str, dtype: str, length: int, pays: bool | None) -> None:
    problem = rainfusion.AttentionProblem(1, 2, length, length, 128, dtype)
    kind, _, index = device.partition(":")
    where = Device(kind, int(index) if index else None)
    estimate = TorchBackend().speedup(rainfusion.plan(problem), where)
    assert (estimate if estimate is None else estimate > 1) == pays
