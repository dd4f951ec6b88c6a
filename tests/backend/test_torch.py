"""The torch backend: what is its own, beside the conformance kit that every backend passes."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rainfusion
from rainfusion.backends.torch import dense, gather, kept
from rainfusion.backends.torch.backend import TorchBackend
from rainfusion.backends.torch.rows import bucket
from rainfusion.core.backend import Device
from rainfusion.core.errors import MaskError, NoBackendError, ProblemError, SparsityWarning
from rainfusion.core.layout import TokenLayout
from rainfusion.core.lower import lower
from rainfusion.core.mask import BlockMask
from rainfusion.core.planner import plan
from rainfusion.core.policy import Fixed, TopK, TopP
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
    problem = AttentionProblem(1, 4, 96, 64, 8, kv_heads=2)
    made = plan(problem, TokenLayout(block=16), TopK(0.5))
    counts = np.full((1, 4, 6), 2)
    counts[:, :, 4:] = 4
    counts[0, 3, 0] = 3
    rows = bucket(counts, made, torch.device("cpu"))
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


def test_a_given_mask_with_an_empty_row_is_refused():
    q, k, v = tensors((1, 1, 32, 8), (1, 1, 32, 8))
    blocks = torch.eye(2, dtype=torch.bool)[None, None] & torch.tensor([True, False])
    with pytest.raises(MaskError, match="batch 0, head 0, row 1"):
        rainfusion.attention(q, k, v, mask=BlockMask(blocks, 32, 32, (16, 16)), block=16, backend="torch")


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
    monkeypatch.setattr(kept, "gather", lambda x, at, *rest: rows.append(len(at)) or gather.gather(x, at, *rest))
    cut = lowered(q, k, 16, **how)(q, k, v, mask=mask)
    assert set(rows) == {1}
    torch.testing.assert_close(whole, cut, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_stays_within_the_limit(monkeypatch, dtype):
    q, k, v = tensors((1, 2, 2048, 32), (1, 2, 2048, 32), dtype)
    mask = random_mask(q, k, (64, 64), density=0.2)
    taken = {}
    take = gather.Scratch.take

    def watched(self, use, shape, dtype):
        made = take(self, use, shape, dtype)
        taken[use] = max(taken.get(use, 0), made.numel() * made.element_size())
        return made

    monkeypatch.setattr(kept, "CPU_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(gather.Scratch, "take", watched)
    lowered(q, k, 64)(q, k, v, mask=mask)
    assert 1 << 18 < sum(taken.values()) <= 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lse", [False, True])
def test_dense_in_runs_of_queries(monkeypatch, dtype, lse):
    q, k, v = tensors((2, 4, 70, 16), (2, 2, 50, 16), dtype)
    monkeypatch.setattr(dense, "CPU_SCORE_BYTES", 50 * 4 * 2 * 9)
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


def test_gradients_are_refused_but_not_without_autograd():
    q, k, v = (x.requires_grad_() for x in tensors((1, 1, 64, 8), (1, 1, 64, 8)))
    with pytest.raises(ProblemError, match="no_grad"):
        rainfusion.attention(q, k, v, block=16, sparsity=0.5, backend="torch")
    with torch.no_grad():
        assert not rainfusion.attention(q, k, v, block=16, sparsity=0.5, backend="torch").requires_grad


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
def test_attention_is_never_left_to_the_semantics(omitted, sparsity):
    made = plan(AttentionProblem(1, 1, 64, 64, 8), TokenLayout(block=16), TopK(sparsity), omitted=omitted)
    steps = rainfusion.lower(made, device="cpu", backend="torch").steps
    by = {op.name: step.by for step in steps for op in step.segment.ops}
    assert by["attend"] == by.get("merge", "torch") == "torch"


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
