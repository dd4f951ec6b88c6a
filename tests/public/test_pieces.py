"""The pieces of a call: selection, block means, joining, the given order, and what is given at call time."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch

import rainfusion
from rainfusion import AttentionProblem, Fixed, Grid, Text, TokenLayout, Tokens, TopK, attention, lower, plan
from rainfusion.core.errors import MaskError, ProblemError
from rainfusion.core.executable import Executable

CLIP = {"grid": (5, 8, 12), "text": 30, "block": (32, 16)}  # 510 tokens, both sides ragged
LENGTH = 510

pytestmark = pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning")


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(5)
    return [rng.standard_normal((2, heads, LENGTH, 16), dtype=np.float32) for heads in (4, 2, 2)]


@pytest.fixture(params=["reference", "torch", "openvino"])
def backend(request):
    return request.param


def test_select_makes_the_mask_that_attention_uses(qkv, backend):
    q, k, v = qkv
    for how in ({"sparsity": 0.4}, {"policy": rainfusion.TopP(0.6)}, {"sparsity": (0.3, 0.4, 0.5, 0.6)}):
        mask = rainfusion.select(q, k, **CLIP, **how, backend=backend)
        out, used = attention(q, k, v, **CLIP, **how, return_mask=True, backend=backend)
        np.testing.assert_array_equal(mask.blocks, used.blocks)
        given = attention(q, k, v, **CLIP, mask=mask, backend=backend)
        np.testing.assert_allclose(given, out, atol=1e-6)
    with pytest.raises(ProblemError, match="sparsty is not an argument; choose from grid, text"):
        rainfusion.select(q, k, **CLIP, sparsty=0.4)


def test_a_selection_that_keeps_every_block_takes_lengths_all_the_same(qkv, backend):
    q, k, _ = qkv
    for _ in range(2):
        mask = rainfusion.select(q, k, sparsity=0.0, block=32, kv_lengths=np.array([500, 20]), backend=backend)
        assert mask.blocks.all()


def test_block_means_are_those_of_the_blocks(qkv, backend):
    layout = TokenLayout((5, 8, 12), 30, block=(32, 16))
    for side, x, block in (("q", qkv[0], 32), ("kv", qkv[1], 16)):
        means = rainfusion.block_means(x, side=side, **CLIP, backend=backend)
        ordered = layout.to_blocks(x)
        expected = [ordered[:, :, i : i + block].mean(axis=2) for i in range(0, LENGTH, block)]
        np.testing.assert_allclose(means, np.stack(expected, axis=2), atol=1e-5)
    with pytest.raises(ProblemError, match="side='v' is not known"):
        rainfusion.block_means(qkv[0], side="v", **CLIP)


@pytest.mark.parametrize("tensor_layout", ["bhsd", "bshd"])
def test_merge_joins_two_attentions_over_disjoint_keys(qkv, tensor_layout):
    q, k, v = (x if tensor_layout == "bhsd" else np.swapaxes(x, 1, 2) for x in qkv)
    axis = 2 if tensor_layout == "bhsd" else 1
    how = {"sparsity": 0, "return_lse": True, "tensor_layout": tensor_layout, "backend": "reference"}
    whole, whole_lse = attention(q, k, v, **how)
    parts = [np.split(x, [200], axis=axis) for x in (k, v)]
    halves = [attention(q, *pair, **how) for pair in zip(*parts, strict=True)]
    out, lse = rainfusion.merge(*halves[0], *halves[1], tensor_layout=tensor_layout)
    np.testing.assert_allclose(out, whole, atol=1e-6)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-6)
    with pytest.raises(ProblemError, match="give two of one problem"):
        rainfusion.merge(*halves[0], halves[1][0][:1], halves[1][1])


def test_shards_of_the_keys_with_columns_of_one_mask_give_the_whole(qkv, backend):
    """As a ring does: rows that keep nothing in a shard are 0 and minus infinity there."""
    q, k, v = (TokenLayout((5, 8, 12), 30, block=(32, 16)).to_blocks(x) for x in qkv)
    how = {"block": (32, 16), "return_lse": True, "backend": backend}
    blocks = np.random.default_rng(7).random((2, 4, 16, 32)) < 0.1
    blocks[..., 0] = True
    mask = rainfusion.BlockMask.from_bool(blocks, LENGTH, LENGTH, (32, 16))
    whole, whole_lse = attention(q, k, v, mask=mask, **how)
    out, lse = np.zeros_like(whole), np.full_like(whole_lse, -np.inf)
    for first in range(0, 32, 8):
        tokens = slice(first * 16, (first + 8) * 16)
        shard = mask[:, :, :, first : first + 8]
        part = attention(q, k[:, :, tokens], v[:, :, tokens], mask=shard, **how)
        nothing = np.repeat(~shard.blocks.any(axis=-1), 32, axis=2)[:, :, :LENGTH]
        assert nothing.any() or first == 0
        assert (part[0][nothing] == 0).all()
        assert (part[1][nothing] == -np.inf).all()
        out, lse = rainfusion.merge(out, lse, *part)
    np.testing.assert_allclose(out, whole, atol=2e-5)
    np.testing.assert_allclose(lse, whole_lse, atol=2e-5)


def test_order_given_spares_the_permutation(qkv, backend):
    layout = TokenLayout((5, 8, 12), 30, block=(32, 16))
    ordered = [layout.to_blocks(x) for x in qkv]
    out = attention(*ordered, **CLIP, order="given", sparsity=0.4, backend=backend)
    expected = attention(*qkv, **CLIP, sparsity=0.4, backend=backend)
    np.testing.assert_allclose(layout.from_blocks(out), expected, atol=1e-5)


@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("text_position", ["start", "end"])
def test_padded_text_of_a_batch_equals_every_sample_alone(naive, qkv, text_position, omitted, backend):
    """Against masked float64 attention, and against the samples cut to their lengths; sparse and dense."""
    lengths = np.array([LENGTH - 11, LENGTH], dtype=np.int32)
    how = {**CLIP, "text_position": text_position, "omitted": omitted, "return_lse": True, "backend": backend}
    layout = TokenLayout((5, 8, 12), 30, text_position, block=(32, 16))
    valid = layout.inverse < lengths[:, None]
    poisoned = [np.where(valid[:, None, :, None], x, np.nan).astype(np.float32) for x in qkv[1:]]
    for sparsity in (0, 0.4):
        out, lse, mask = attention(qkv[0], *poisoned, **how, sparsity=sparsity, kv_lengths=lengths, return_mask=True)
        assert (out.swapaxes(1, 2)[~valid] == 0).all()
        assert np.isfinite(out).all()
        if omitted == "drop":
            attended = mask.to_dense(layout) & valid[:, None, None, :]
            expected, expected_lse = naive(*qkv, attended)
            rows = np.broadcast_to(valid[:, None], lse.shape)
            np.testing.assert_allclose(out[rows], expected[rows], atol=2e-5)
            np.testing.assert_allclose(lse[rows], expected_lse[rows], atol=2e-5)
    assert rainfusion.cache is rainfusion.dispatch.cache


def test_lengths_may_live_where_the_tensors_do(qkv):
    tensors = [torch.from_numpy(x) for x in qkv]
    given = [np.array([500, 510]), [500, 510], torch.tensor([500, 510]), torch.tensor([500, 510], dtype=torch.int32)]
    outs = [attention(*tensors, **CLIP, kv_lengths=lengths, backend="torch") for lengths in given]
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    for wrong in ([500.0, 510.0], [500], np.zeros((2, 1), int), "510", torch.tensor([500, 510], device="meta")):
        with pytest.raises(ProblemError, match="kv_lengths"):
            attention(*tensors, **CLIP, kv_lengths=wrong, backend="torch")


def test_numbers_beyond_32_bits_are_clamped_not_wrapped_around(qkv, backend):
    plain = attention(*qkv, **CLIP, sparsity=0.4, backend=backend)
    for lengths in ([10**10, 2**32 + 7], np.array([10**10, 2**32 + 7])):
        out = attention(*qkv, **CLIP, sparsity=0.4, kv_lengths=lengths, backend=backend)
        np.testing.assert_allclose(out, plain, atol=1e-5)
    nothing = attention(*qkv, **CLIP, sparsity=0.4, kv_lengths=[-(2**40), -5], backend=backend)
    assert (nothing == 0).all()


def test_budgets_of_every_head_layer_and_step_lower_once(qkv, monkeypatch):
    lowered = []
    original = rainfusion.core.lowering.lower
    monkeypatch.setattr(rainfusion.core.lowering, "lower", lambda *a, **k: lowered.append(a) or original(*a, **k))
    rainfusion.cache.clear()
    planned = plan(AttentionProblem.from_tensors(*qkv), TokenLayout((5, 8, 12), 30, block=(32, 16)), quotas=True)
    rng = np.random.default_rng(0)
    for _ in range(20):
        quotas = rng.integers(0, planned.kv_axis.free_blocks, (4, planned.q_axis.free_blocks), dtype=np.int32)
        _, mask = attention(*qkv, **CLIP, quotas=quotas, return_mask=True, backend="reference")
        protected = planned.kv_axis.blocks - planned.kv_axis.free_blocks
        kept = mask.counts[:, :, : planned.q_axis.free_blocks] - protected
        np.testing.assert_array_equal(kept, np.broadcast_to(quotas, kept.shape))
    assert len(lowered) == 1
    for wrong in (np.zeros((3, planned.q_axis.free_blocks), int), np.zeros((4, 1), int), np.zeros((4, 2))):
        with pytest.raises(ProblemError, match="quotas is"):
            attention(*qkv, **CLIP, quotas=wrong, backend="reference")
    with pytest.raises(ProblemError, match="sparsity and quotas both say what to attend"):
        attention(*qkv, **CLIP, quotas=quotas, sparsity=0.5)


PARTS = {
    "Qwen-Image-Edit": (Text(37), Grid(1, 13, 15), Grid(1, 9, 11), Grid(1, 8, 8)),
    "two clips with audio": (Grid(5, 4, 6), Tokens(25), Grid(3, 6, 4), Tokens(15), Text(9)),
    "image to video": (Grid(6, 5, 7, sink=("first_frame", "last_frame")), Text(12)),
    "columns only": (Grid(6, 5, 7, sink=("first_frame_keys", "last_frame")), Text(12)),
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_sequences_of_parts_are_planned_printed_and_run(naive, rng, parts, backend):
    layout = TokenLayout(parts=parts, block=8)
    q, k, v = (rng.standard_normal((1, 2, layout.length, 8), dtype=np.float32) for _ in range(3))
    out, lse, mask = attention(
        q, k, v, parts=parts, block=8, sparsity=0.4, return_lse=True, return_mask=True, backend=backend
    )
    expected, expected_lse = naive(q, k, v, mask.to_dense(layout))
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-5)
    text = str(plan(AttentionProblem.from_tensors(q, k, v), layout, TopK(0.4)))
    for part in parts:
        assert str(getattr(part, "sizes", (part.count,))[-1]) in text
    dense = mask.to_dense(layout)
    for named, start, stop, rows in layout.protected:
        tokens = layout.order[start:stop]
        assert dense[..., tokens].all(), f"every query attends to {named}"
        assert dense[:, :, tokens].all() or not rows


def test_a_mask_is_accepted_by_the_plans_it_fits(qkv):
    problem, layout = AttentionProblem.from_tensors(*qkv), TokenLayout((5, 8, 12), 30, block=(32, 16))
    mask = rainfusion.select(*qkv[:2], **CLIP, sparsity=0.4)
    assert plan(problem, layout, Fixed()).accepts(mask)
    assert not plan(problem, TokenLayout((5, 12, 8), 30, block=(32, 16)), Fixed()).accepts(mask)
    assert not plan(problem, TokenLayout((5, 8, 12), 30, block=16), Fixed()).accepts(mask)
    assert plan(problem, layout, Fixed()).accepts(rainfusion.BlockMask(mask.blocks, LENGTH, LENGTH, (32, 16)))
    with pytest.raises(MaskError, match="in another order"):
        attention(*qkv, **CLIP | {"grid": (5, 12, 8)}, mask=mask)


def test_a_lowered_plan_can_be_pickled(qkv):
    tensors = [torch.from_numpy(x) for x in qkv]
    planned = plan(AttentionProblem.from_tensors(*tensors), TokenLayout((5, 8, 12), 30, block=(32, 16)), TopK(0.4))
    run = lower(planned, like=tensors[0], backend="torch")
    again = pickle.loads(pickle.dumps(run))
    assert torch.equal(again(*tensors), run(*tensors))


def test_little_python_runs_before_the_first_operation(qkv, monkeypatch):
    """At most half of what the first edition needed for a call it had seen: 65 calls in this package."""
    counted = []
    attention(*qkv, **CLIP, sparsity=0.4, backend="reference")
    original = Executable.compute

    def compute(self, arguments):
        sys.setprofile(None)
        return original(self, arguments)

    def profile(frame, event, arg):
        if event == "call" and "rainfusion" in frame.f_code.co_filename:
            counted.append(frame.f_code.co_name)

    monkeypatch.setattr(Executable, "compute", compute)
    sys.setprofile(profile)
    try:
        attention(*qkv, **CLIP, sparsity=0.4, backend="reference")
    finally:
        sys.setprofile(None)
    assert 0 < len(counted) <= 65
