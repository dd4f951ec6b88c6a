"""What the plan computes, against masked attention over all tokens at once in float64 (`naive`)."""

from __future__ import annotations

import math
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rainfusion import AttentionProblem, BlockMask, Fixed, Text, TokenLayout, TopK, TopP, lower, plan
from rainfusion.core import ops
from rainfusion.core.errors import SparsityWarning
from rainfusion.core.mask_sizes import block_of_token

NAMES = ("%out", "%lse", "%mask")


@st.composite
def tasks(draw):
    """Problems over every feature: batch, grouped heads, two lengths, ragged and unequal blocks, odd head dims."""
    block = draw(st.sampled_from([4, 8, (8, 4), (4, 16), (16, 8)]))
    grid = draw(st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))))
    text = draw(st.integers(0, 20)) if grid else 0
    layout = TokenLayout(grid, text, draw(st.sampled_from(["start", "end"])), block=block)
    own, other = layout.length or draw(st.integers(1, 120)), draw(st.integers(1, 120))
    q_len, kv_len = draw(st.sampled_from([(own, own), (own, other), (other, own)]))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]))
    problem = AttentionProblem(
        draw(st.integers(1, 2)),
        heads,
        q_len,
        kv_len,
        draw(st.sampled_from([1, 5, 8])),
        draw(st.sampled_from(["float32", "float64"])),
        kv_heads,
        draw(st.sampled_from([None, 0.3, 2.0])),
        draw(st.sampled_from(["bhsd", "bshd"])),
    )
    policy = draw(st.sampled_from([TopK(0), TopK(0.5), TopK(0.75), TopK(0.97), TopP(0.6), TopP(0.9, floor=0.3)]))
    return problem, layout, policy


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsityWarning)
        return plan(*args, **kwargs)


def tensors(problem, seed=3):
    rng = np.random.default_rng(seed)
    shapes = (problem.q_shape, problem.kv_shape, problem.kv_shape)
    return [rng.standard_normal(shape).astype(problem.dtype) for shape in shapes]


def as_bhsd(x, problem):
    return x if problem.tensor_layout == "bhsd" else np.swapaxes(x, 1, 2)


def close(actual, expected, dtype):
    tolerance = 1e-10 if dtype == "float64" else 3e-5
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=150)
@given(tasks())
def test_dropping_equals_masked_attention(naive, task):
    """Output and log-sum-exp (Law 5) of the blocks kept, in the caller's token order, for every feature."""
    problem, layout, policy = task
    q, k, v = tensors(problem)
    out, lse, mask = lower(quietly(problem, layout, policy, returns=NAMES), backend="reference")(q, k, v)
    expected, expected_lse = naive(*(as_bhsd(x, problem) for x in (q, k, v)), mask.to_dense(layout), problem.scale)
    close(as_bhsd(out, problem), expected, problem.dtype)
    close(lse, expected_lse, problem.dtype)
    assert out.dtype == q.dtype
    assert lse.dtype == (np.float64 if problem.dtype == "float64" else np.float32)


@settings(max_examples=100)
@given(tasks())
def test_summary_adds_a_mean_key_and_value_with_log_count_for_every_skipped_block(naive, task):
    problem, layout, policy = task
    q, k, v = tensors(problem)
    planned = quietly(problem, layout, policy, omitted="summary", returns=NAMES)
    out, lse, mask = lower(planned, backend="reference")(q, k, v)
    q, k, v = (as_bhsd(x, problem) for x in (q, k, v))
    member = np.zeros((planned.kv_axis.blocks, problem.kv_len))
    member[block_of_token(layout, problem.kv_len, layout.block[1]), np.arange(problem.kv_len)] = 1
    counts = member.sum(axis=1)
    means = [np.einsum("nt,bhtd->bhnd", member / counts[:, None], x.astype(np.float64)) for x in (k, v)]
    # One extra key a block. The log of its count enters the logit through a channel of ones.
    bias = np.log(counts) / problem.scale
    extra = np.concatenate([np.zeros(problem.kv_len), bias])[:, None]
    keys = np.concatenate([k, means[0]], axis=2)
    keys = np.concatenate([keys, np.broadcast_to(extra, (*keys.shape[:-1], 1))], axis=-1)
    queries = np.concatenate([q, np.ones((*q.shape[:-1], 1))], axis=-1)
    values = np.concatenate([v, means[1]], axis=2)
    kept = mask.to_dense(layout)
    rows = block_of_token(layout, problem.q_len, layout.block[0])
    dense = np.concatenate([kept, ~mask.blocks[:, :, rows]], axis=-1)
    padded_values = np.concatenate([values, np.zeros((*values.shape[:-1], 1))], axis=-1)
    expected, expected_lse = naive(queries, keys, padded_values, dense, problem.scale)
    close(as_bhsd(out, problem), expected[..., :-1], problem.dtype)
    close(lse, expected_lse, problem.dtype)


@settings(max_examples=60)
@given(tasks(), st.integers(0, 2**32 - 1))
def test_a_given_mask_of_any_shape_per_sample_and_head(naive, task, seed):
    problem, layout, _ = task
    q, k, v = tensors(problem)
    planned = plan(problem, layout, Fixed(), returns=NAMES)
    rng = np.random.default_rng(seed)
    blocks = rng.random((problem.batch, problem.heads, planned.q_axis.blocks, planned.kv_axis.blocks)) < rng.random()
    blocks[..., rng.integers(planned.kv_axis.blocks)] = True
    mask = BlockMask.from_bool(blocks, problem.q_len, problem.kv_len, layout.block)
    out, lse, returned = lower(planned, backend="reference")(q, k, v, mask=mask)
    assert returned is mask
    expected, expected_lse = naive(*(as_bhsd(x, problem) for x in (q, k, v)), mask.to_dense(layout), problem.scale)
    close(as_bhsd(out, problem), expected, problem.dtype)
    close(lse, expected_lse, problem.dtype)


@pytest.mark.parametrize("returns", [("%mask",), ("%lse",), ("%lse", "%mask"), NAMES])
@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("policy", [TopK(0), TopK(0.3), TopP(0.5)], ids=str)
def test_a_plan_returns_what_is_asked_and_runs_nothing_else(policy, omitted, returns):
    problem, layout = AttentionProblem(1, 2, 96, 96, 8), TokenLayout((3, 4, 8), block=8)
    inputs = tensors(problem)
    whole = lower(quietly(problem, layout, policy, omitted=omitted, returns=NAMES), backend="reference")(*inputs)
    planned = plan(problem, layout, policy, omitted=omitted, returns=returns)
    some = lower(planned, backend="reference")(*inputs)
    for name, value in zip(returns, some if len(returns) > 1 else [some], strict=True):
        known = whole[NAMES.index(name)]
        same = (value.blocks, known.blocks) if name == "%mask" else (value, known)
        np.testing.assert_array_equal(*same)
    assert ("attend" in {op.name for op in planned.ops}) == (returns != ("%mask",))
    assert planned.is_dense == (policy == TopK(0))


def test_order_given_equals_permuting_around_the_window_order():
    problem, layout = AttentionProblem(1, 2, 203, 203, 8), TokenLayout((3, 7, 9), text=14, block=16)
    window = lower(plan(problem, layout, TopK(0.25)), backend="reference")
    given_order = lower(plan(problem, layout, TopK(0.25), order="given"), backend="reference")
    q, k, v = tensors(problem)
    folded = given_order(*(x[:, :, layout.order] for x in (q, k, v)))
    np.testing.assert_array_equal(window(q, k, v), folded[:, :, layout.inverse])
    assert "%order" not in str(given_order.plan)


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2**-10), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_half_precision_is_computed_in_float32_and_rounded_once(naive, dtype, unit, kind):
    problem = AttentionProblem(2, 4, 144, 144, 24, dtype, kv_heads=2)
    layout = TokenLayout((4, 6, 6), block=(32, 16))
    single = [x.astype(np.float32) for x in tensors(AttentionProblem(2, 4, 144, 144, 24, kv_heads=2))]
    if kind == "torch":
        inputs = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in single]
        rounded = [x.float().numpy() for x in inputs]
    else:
        inputs = [x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for x in single]
        rounded = [x.astype(np.float32) for x in inputs]
    out, lse, mask = lower(plan(problem, layout, TopK(0.3), returns=NAMES), backend="reference")(*inputs)
    assert out.dtype == inputs[0].dtype
    out, lse = (x.float().numpy() if kind == "torch" else x.astype(np.float32) for x in (out, lse))
    mask = mask.like(single[0])
    expected, expected_lse = naive(*rounded, mask.to_dense(layout))
    assert np.abs(out - expected).max() <= unit / 2 * np.abs(expected).max() + 1e-5
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)
    exact = lower(plan(AttentionProblem(2, 4, 144, 144, 24, kv_heads=2), layout, TopK(0.3)), backend="reference")
    assert np.abs(out - exact(*rounded)).max() <= unit / 2 * np.abs(expected).max()


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_merging_two_halves_of_the_keys_gives_the_whole(first, second, rows, seed):
    """Law 5, what ring attention relies on."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, 2, n, 8)) * 3 for n in (rows, first + second, first + second))
    whole = ops.attend(q, k, v, block=(16, 16), scale=0.5)
    halves = [
        ops.attend(q, k[:, :, part], v[:, :, part], block=(16, 16), scale=0.5)
        for part in (slice(first), slice(first, None))
    ]
    for actual, expected in zip(ops.merge(*halves[0], *halves[1]), whole, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_merging_with_a_side_that_kept_nothing(xp):
    out, lse = xp.asarray([[[[1.0, 2.0], [3.0, 4.0]]]]), xp.asarray([[[0.5, -math.inf]]])
    nothing, never = xp.zeros_like(out), xp.full_like(lse, -math.inf)
    out = out * xp.asarray([1.0, 0.0])[:, None]
    for pair in ((out, lse, nothing, never), (nothing, never, out, lse)):
        merged, merged_lse = ops.merge(*pair)
        np.testing.assert_array_equal(np.asarray(merged), np.asarray(out))
        np.testing.assert_array_equal(np.asarray(merged_lse), np.asarray(lse))


def masked_problem(heads=2):
    """One sample, two heads that keep different numbers of key blocks, a ragged tail."""
    mask = np.array([[[1, 0, 0, 1], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 0, 1]]], dtype=bool)[None]
    return BlockMask.from_bool(mask[:, :heads], 14, 30, (8, 8))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_what_stands_in_dropped_blocks_never_leaks(naive, rng, poison, which):
    mask = masked_problem()
    q, k, v = (rng.standard_normal((1, 2, n, 4)) for n in (14, 30, 30))
    clean, _ = naive(q, k, v, mask.to_dense())
    {"k": k, "v": v}[which][:, :, 16:24] = poison  # block 2, which no row keeps
    out, _ = ops.attend(q, k, v, mask=mask.blocks, block=(8, 8), scale=0.5)
    np.testing.assert_allclose(out, clean, rtol=1e-12)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_in_attended_tokens_spread_as_in_dense_attention(rng, poison, which):
    """Each row against PyTorch's own attention over exactly the tokens it keeps."""
    mask = masked_problem()
    q, k, v = (rng.standard_normal((1, 2, n, 4)) for n in (14, 30, 30))
    {"k": k, "v": v}[which][:, :, 3, 1] = poison
    with np.errstate(invalid="ignore"):
        out, _ = ops.attend(q, k, v, mask=mask.blocks, block=(8, 8), scale=0.5)
    dense = mask.to_dense()
    for h, i in np.ndindex(2, 14):
        keep = dense[0, h, i]
        row = (
            torch.from_numpy(x) for x in (q[:1, h : h + 1, i : i + 1], k[:1, h : h + 1, keep], v[:1, h : h + 1, keep])
        )
        np.testing.assert_allclose(out[0, h, i], torch.nn.functional.scaled_dot_product_attention(*row)[0, 0, 0], 1e-9)


def test_a_row_that_keeps_nothing_is_zero_with_minus_infinite_log_sum_exp(rng):
    q, k, v = (rng.standard_normal((1, 1, 16, 4)) for _ in range(3))
    mask = np.array([[[[False, False], [True, False]]]])
    out, lse = ops.attend(q, k, v, mask=mask, block=(8, 8), scale=0.5)
    assert (out[0, 0, :8] == 0).all()
    assert (lse[0, 0, :8] == -np.inf).all()
    assert np.isfinite(lse[0, 0, 8:]).all()


def test_a_nan_key_block_is_selected_last():
    problem, layout = AttentionProblem(1, 1, 64, 64, 4), TokenLayout(block=8)
    q, k, v = tensors(problem)
    k[:, :, 16:24] = np.nan
    out, mask = lower(plan(problem, layout, TopK(0.25), returns=["%out", "%mask"]), backend="reference")(q, k, v)
    assert not mask.blocks[..., 2].any()
    assert np.isfinite(out).all()


@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_block_means_of_ragged_blocks_through_an_order(rng, xp):
    x = rng.standard_normal((2, 3, 21, 5)).astype(np.float32)
    order = rng.permutation(21)
    expected = [x[:, :, order[i : i + 8]].mean(axis=2) for i in (0, 8, 16)]
    means = ops.block_mean(xp.asarray(x), xp.asarray(order), block=8)
    np.testing.assert_allclose(np.asarray(means), np.stack(expected, axis=2), rtol=1e-5, atol=1e-6)


def test_block_means_of_half_precision_do_not_overflow():
    means = ops.block_mean(np.full((1, 1, 8, 2), 60000, dtype=np.float16), None, block=8)
    assert means.dtype == np.float32
    assert (means == 60000).all()


def test_numpy_and_torch_run_the_same_definition(rng):
    """Every operation of a sparse plan with summary on torch tensors, against NumPy."""
    problem, layout = AttentionProblem(2, 4, 203, 203, 8, kv_heads=2), TokenLayout((3, 7, 9), text=14, block=(16, 8))
    q, k, v = tensors(problem)
    block, order = layout.block, layout.order
    axes = {"q": layout.axis(203, 0), "kv": layout.axis(203, 1)}

    def run(xp):
        x, y, z, o = (xp.asarray(np.array(a)) for a in (q, k, v, order))
        qb, kb, vb = (ops.block_mean(a, o, block=b) for a, b in ((x, block[0]), (y, block[1]), (z, block[1])))
        quotas = xp.asarray(TopK(0.7).budget(**axes, heads=4).quotas)
        mask = ops.select(ops.block_score(qb, kb, scale=0.5), quotas, **axes)
        both = o, xp.asarray(np.array(layout.inverse))
        kept = ops.attend(x, y, z, both, o, mask, block=block, scale=0.5)
        rest = ops.attend_means(x, kb, vb, mask, both, block=block, kv_len=203, scale=0.5)
        return mask, *ops.merge(*kept, *rest)

    ours, theirs = run(np), run(torch)
    np.testing.assert_array_equal(ours[0], theirs[0].numpy())
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-5)


@settings(max_examples=60)
@given(tasks(), st.sampled_from(["drop", "summary"]), st.integers(0, 2**32 - 1))
def test_padded_keys_take_no_part_and_padded_queries_give_zero(naive, task, omitted, seed):
    """`kv_lengths` against the same call on masked attention in float64; padding holds NaN, which must not spread."""
    problem, layout, policy = task
    q, k, v = tensors(problem)
    planned = quietly(problem, layout, policy, omitted="drop", returns=NAMES, kv_lengths=True)
    lengths = np.random.default_rng(seed).integers(-5, problem.kv_len + 60, problem.batch)  # clamped
    tail_is_last = planned.is_dense and (not layout.parts or isinstance(layout.parts[-1], Text))
    places = [
        np.arange(n) if layout.length != n or tail_is_last else layout.inverse for n in (problem.q_len, problem.kv_len)
    ]
    valid_k = places[1] < lengths[:, None]
    valid_q = places[0] < lengths[:, None] if problem.q_len == problem.kv_len else np.ones((problem.batch, 1), bool)
    for x in (k, v):
        as_bhsd(x, problem).swapaxes(1, 2)[~valid_k] = np.nan
    out, lse, mask = lower(planned, backend="reference")(q, k, v, kv_lengths=lengths)
    attended = mask.to_dense(layout) & valid_k[:, None, None, :]
    clean = [np.nan_to_num(as_bhsd(x, problem)) for x in (q, k, v)]
    with np.errstate(all="ignore"):
        expected, expected_lse = naive(*clean, attended, problem.scale)
    nothing = ~attended.any(axis=-1) | ~valid_q[:, None, :]
    close(as_bhsd(out, problem), np.where(nothing[..., None], 0, expected), problem.dtype)
    close(lse, np.where(nothing, -np.inf, expected_lse), problem.dtype)
    if omitted == "summary":
        summed = quietly(problem, layout, policy, omitted="summary", kv_lengths=True)
        assert np.isfinite(lower(summed, backend="reference")(q, k, v, kv_lengths=lengths)).all()


def test_lengths_of_whole_samples_change_nothing(rng):
    problem, layout = AttentionProblem(2, 2, 203, 203, 8), TokenLayout((3, 7, 9), text=14, block=16)
    inputs = tensors(problem)
    for omitted in ("drop", "summary"):
        plain = lower(plan(problem, layout, TopK(0.2), omitted=omitted), backend="reference")(*inputs)
        given_lengths = plan(problem, layout, TopK(0.2), omitted=omitted, kv_lengths=True)
        whole = lower(given_lengths, backend="reference")(*inputs, kv_lengths=[203, 203])
        np.testing.assert_allclose(whole, plain, rtol=1e-5, atol=1e-6)


def test_summaries_count_only_valid_tokens(rng):
    """A padded sample with summaries equals the same sample cut short."""
    layout, short = TokenLayout((4, 4, 4), text=16, block=8), TokenLayout((4, 4, 4), text=11, block=8)
    q, k, v = (rng.standard_normal((1, 2, 80, 8)) for _ in range(3))
    settings_ = {"omitted": "summary", "returns": ["%out", "%lse"]}
    padded = plan(AttentionProblem.from_tensors(q, k, v), layout, TopK(0.3), kv_lengths=True, **settings_)
    out, lse = lower(padded, backend="reference")(q, k, v, kv_lengths=[75])
    cut = [x[:, :, :75] for x in (q, k, v)]
    quotas = padded.quotas(TopK(0.3))
    exact = plan(AttentionProblem.from_tensors(*cut), short, quotas=True, **settings_)
    expected, expected_lse = lower(exact, backend="reference")(*cut, quotas=quotas)
    np.testing.assert_allclose(out[:, :, :75], expected, rtol=1e-9)
    np.testing.assert_allclose(lse[:, :, :75], expected_lse, rtol=1e-9)
    assert (out[:, :, 75:] == 0).all()


def test_quotas_at_call_time_equal_the_policy_that_has_them(rng):
    problem, layout = AttentionProblem(2, 3, 203, 203, 8), TokenLayout((3, 7, 9), text=14, block=16)
    inputs = tensors(problem)
    run = lower(plan(problem, layout, quotas=True), backend="reference")
    for policy in (TopK(0.2), TopK((0.1, 0.2, 0.3))):
        fixed = lower(quietly(problem, layout, policy), backend="reference")(*inputs)
        np.testing.assert_array_equal(run(*inputs, quotas=run.plan.quotas(policy)), fixed)
    everything = np.full((1, run.plan.q_axis.free_blocks), 10**6)
    dense = lower(plan(problem, layout, TopK(0)), backend="reference")(*inputs)
    np.testing.assert_allclose(run(*inputs, quotas=everything), dense, rtol=1e-5, atol=1e-6)
