"""Laws 1 and 4: sparsity is what is really skipped, and every row keeps a block."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rainfusion import AttentionProblem, Fixed, Text, TokenLayout, TopK, TopP, lower, plan
from rainfusion.core import ops
from rainfusion.core.errors import PolicyError, SparsityWarning
from rainfusion.core.policies import Hybrid, spread

sparsities = st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0, 0.5, 0.8, 0.9, math.nextafter(1, 0)]))


@st.composite
def tasks(draw):
    """A layout and a problem that it fits: self-attention, or with the grid on one side alone, or no grid."""
    block = draw(st.sampled_from([4, 8, (8, 4), (4, 16)]))
    grid = draw(st.one_of(st.none(), st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))))
    text = draw(st.integers(0, 30)) if grid else 0
    sink = draw(st.sampled_from(["first_frame", None]))
    layout = TokenLayout(grid, text, draw(st.sampled_from(["start", "end"])), block=block, sink=sink)
    own, other = layout.length or draw(st.integers(1, 200)), draw(st.integers(1, 200))
    lengths = draw(st.sampled_from([(own, own), (own, other), (other, own)]))
    heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    return layout, AttentionProblem(draw(st.integers(1, 2)), heads[0], *lengths, 4, kv_heads=heads[1])


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsityWarning)
        return plan(*args, **kwargs)


def protected_blocks(layout: TokenLayout, length: int, side: int) -> np.ndarray:
    """Which blocks of a side hold a token of the first frame or of text, worked out token by token."""
    block = layout.block[side]
    protected = np.zeros(-(-length // block), dtype=bool)
    if layout.grid is None or length != layout.length:
        return protected
    frames, height, width = layout.grid
    before = layout.text if isinstance(layout.parts[0], Text) else 0
    tokens = [i for i in range(length) if not before <= i < before + frames * height * width]
    if layout.grids[0].sinks:
        tokens += range(before, before + height * width)
    protected[layout.inverse[tokens] // block] = True
    return protected


@settings(max_examples=300)
@given(tasks(), sparsities)
@example((TokenLayout((3, 8, 8), block=8), AttentionProblem(1, 1, 192, 192, 4)), math.nextafter(1, 0))
@example((TokenLayout(block=8), AttentionProblem(1, 1, 5, 5, 4)), 0.8)
def test_realised_sparsity_is_the_nearest_there_is_or_the_most_protection_leaves(task, sparsity):
    layout, problem = task
    planned = quietly(problem, layout, TopK(sparsity))
    rows, columns = protected_blocks(layout, problem.q_len, 0), protected_blocks(layout, problem.kv_len, 1)
    pairs = len(rows) * len(columns)
    free_pairs = int((~rows).sum()) * int((~columns).sum())
    least = pairs - free_pairs + (0 if columns.any() else int((~rows).sum()))
    kept = round(planned.density * pairs)
    assert planned.density == kept / pairs
    assert planned.sparsity == 1 - planned.density
    if kept > least:
        assert abs(planned.sparsity - sparsity) <= 0.5 / pairs + 1e-12
    else:
        assert kept == least
        assert planned.sparsity <= sparsity + 0.5 / pairs + 1e-12
    assert int(planned.row_counts.sum()) == kept * len(planned.row_counts)
    assert planned.row_counts.min() >= 1
    free = planned.row_counts[:, ~rows]
    assert free.size == 0 or free.max() - free.min() <= 1
    assert (planned.row_counts[:, rows] == len(columns)).all()


@settings(max_examples=60)
@given(tasks(), sparsities)
def test_density_is_that_of_the_mask_selected_for_every_batch_and_head(task, sparsity):
    layout, problem = task
    planned = quietly(problem, layout, TopK(sparsity), returns=["%mask"])
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(s, dtype=np.float32) for s in (problem.q_shape, *[problem.kv_shape] * 2))
    mask = lower(planned, backend="reference")(q, k, **({"v": v} if planned.takes("%v") else {}))
    assert mask.density == planned.density
    np.testing.assert_array_equal(mask.counts, np.broadcast_to(planned.row_counts, mask.counts.shape))
    rows, columns = protected_blocks(layout, problem.q_len, 0), protected_blocks(layout, problem.kv_len, 1)
    assert mask.blocks[:, :, rows].all()
    assert mask.blocks[..., columns].all()


@settings(max_examples=60)
@given(tasks(), sparsities)
def test_a_warning_names_the_sparsity_reached_exactly_where_the_asked_one_is_out_of_reach(task, sparsity):
    layout, problem = task
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        planned = plan(problem, layout, TopK(sparsity))
        plan(problem, layout, TopK(sparsity))
    pairs = planned.q_axis.blocks * planned.kv_axis.blocks
    out_of_reach = sparsity - planned.sparsity > 0.5 / pairs + 1e-12
    unreached = [w for w in caught if "cannot be reached" in str(w.message)]
    assert len(unreached) == 2 * out_of_reach, "said at every call, for Python's filters to show once"
    if out_of_reach:
        caught = unreached
        assert caught[0].category is SparsityWarning
        assert f"skips {planned.sparsity:.4f}" in str(caught[0].message)
        assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("sink", "said"), [("first_frame", "keeping first frame takes more"), (None, "keeping one block a row takes more")]
)
def test_a_warning_names_what_stands_in_the_way(sink, said):
    with pytest.warns(SparsityWarning, match=said):
        plan(AttentionProblem(1, 1, 64, 64, 8), TokenLayout((4, 4, 4), block=16, sink=sink), TopK(0.99))


def test_sparsity_zero_is_one_dense_operation():
    problem, layout = AttentionProblem(1, 1, 512, 512, 4), TokenLayout((8, 8, 8), block=32)
    planned = plan(problem, layout, TopK(0))
    assert planned.is_dense
    assert [op.name for op in planned.ops] == ["attend"]
    assert (planned.density, planned.sparsity, planned.flops) == (1.0, 0.0, problem.dense_flops)


@pytest.mark.parametrize(("nominal", "realised"), [(0.8, 0.722), (0.9, 0.813)])
def test_paper_counting_drifts_as_the_published_code_does(nominal, realised):
    problem, layout = AttentionProblem(1, 1, 75600, 75600, 128), TokenLayout((21, 45, 80))
    q, kv = layout.axis(75600, 0), layout.axis(75600, 1)
    budget = TopK(nominal, counting="paper").budget(q, kv, 1)
    score = np.random.default_rng(4).standard_normal((1, 1, q.blocks, kv.blocks), dtype=np.float32)
    kept = ops.select(score, budget.quotas, q=q, kv=kv, over=budget.over)
    assert 1 - kept.mean() == pytest.approx(realised, abs=5e-3)
    assert plan(problem, layout, TopK(nominal, counting="paper")).density is None, "how many overlap is in the data"
    assert quietly(problem, layout, TopK(nominal)).sparsity == pytest.approx(nominal, abs=0.5 / 591**2)


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_spread_shares_a_whole_number_as_evenly_as_whole_numbers_allow(total, rows):
    shares = spread(total, rows)
    assert (len(shares), int(shares.sum())) == (rows, total)
    assert set(shares.tolist()) <= {total // rows, -(-total // rows)}


@settings(max_examples=150)
@given(tasks(), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(task, mass, floor, spiky):
    """Kept columns are the best-scored ones; they reach the mass, and one fewer would not."""
    layout, problem = task
    q, kv = layout.axis(problem.q_len, 0), layout.axis(problem.kv_len, 1)
    policy = TopP(mass, floor)
    score = np.random.default_rng(2).standard_normal((1, 1, q.blocks, kv.blocks)) * (8 if spiky else 1)
    budget = policy.budget(q, kv, 1)
    kept = ops.select(score, budget.quotas, q=q, kv=kv, mass=budget.mass)[0, 0]
    assert kept[q.free_blocks :].all()
    assert kept[:, kv.free_blocks :].all()
    assert kept.any(axis=-1).all()
    weights = np.exp(score[0, 0]) * kv.counts
    weights /= weights.sum(axis=-1, keepdims=True)
    protected = kv.blocks - kv.free_blocks
    for row in range(q.free_blocks):
        chosen = kept[row, : kv.free_blocks]
        ranking = np.argsort(-score[0, 0, row, : kv.free_blocks], kind="stable")
        assert chosen[ranking[: chosen.sum()]].all(), "a better block was passed over"
        reached = weights[row, kept[row]].sum()
        least = max(math.ceil(floor * kv.blocks) - protected, 0 if protected else 1)
        assert chosen.sum() >= min(least, kv.free_blocks)
        assert reached >= mass - 1e-9
        if chosen.sum() > least:
            assert reached - weights[row, ranking[chosen.sum() - 1]] <= mass + 1e-9


def test_top_p_gives_all_mass_to_an_infinite_score_and_none_to_nan():
    layout, score = TokenLayout(block=4), np.zeros((1, 1, 1, 5), dtype=np.float32)
    score[..., 1], score[..., 3] = np.nan, np.inf
    axes = {"q": layout.axis(4, 0), "kv": layout.axis(20, 1)}
    one = np.ones((1, 1), int)
    assert ops.select(score, one, **axes, mass=0.9).tolist() == [[[[False, False, False, True, False]]]]
    everything_nan = ops.select(np.full_like(score, np.nan), one, **axes, mass=0.9)
    assert everything_nan.tolist() == [[[[True, False, False, False, False]]]]


@pytest.mark.parametrize("policy", [TopP(1.0), TopP(0.5, floor=1.0)])
def test_top_p_that_keeps_everything_is_dense(policy):
    assert plan(AttentionProblem(1, 1, 64, 64, 4), TokenLayout(block=8), policy).is_dense


@pytest.mark.parametrize("policy", [TopP(1.0), Hybrid(0.5, 1.0)])
def test_the_whole_mass_is_kept_under_quotas_given_at_call_time_too(policy):
    planned = plan(AttentionProblem(1, 1, 64, 64, 4), TokenLayout(block=8), policy, quotas=True, returns="%mask")
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 64, 4))
    assert lower(planned, backend="reference")(q.astype("f4"), k.astype("f4"), quotas=np.ones((1, 8), int)).blocks.all()


def test_only_the_data_can_tell_the_density_of_top_p_and_of_a_given_mask():
    for policy in (TopP(0.9), Hybrid(0.9, 0.5), Fixed()):
        planned = plan(AttentionProblem(1, 1, 64, 64, 4), TokenLayout(block=8), policy)
        assert (planned.density, planned.sparsity, planned.flops, planned.row_counts) == (None,) * 4


@given(tasks(), sparsities)
def test_predicted_work_grows_with_what_is_kept(task, sparsity):
    layout, problem = task
    assume(problem.q_len > 1)
    dense, sparse = quietly(problem, layout, TopK(0)), quietly(problem, layout, TopK(sparsity))
    scores = 0 if sparse.is_dense else 2 * problem.batch * problem.heads * problem.head_dim
    scores *= sparse.q_axis.blocks * sparse.kv_axis.blocks
    assert sparse.flops == round(dense.flops * sparse.density) + scores


def test_one_share_a_head_is_exact_for_every_head(rng):
    problem, layout = AttentionProblem(1, 3, 512, 512, 8), TokenLayout((8, 8, 8), block=16, sink=None)
    shares = (0.5, 0.75, 0.9)
    planned = plan(problem, layout, TopK(shares), returns=["%mask"])
    mask = lower(planned, backend="reference")(*(rng.standard_normal((1, 3, 512, 8), dtype=np.float32) for _ in "qk"))
    realised = 1 - mask.blocks.mean(axis=(0, 2, 3))
    np.testing.assert_allclose(realised, shares, atol=0.5 / 32**2)
    assert planned.sparsity == pytest.approx(np.mean(realised))
    assert plan(problem, layout, TopK(shares)) != plan(problem, layout, TopK(shares[::-1]))
    with pytest.raises(PolicyError, match="sparsity has 2 shares for 3 heads"):
        plan(problem, layout, TopK((0.5, 0.6)))


def test_hybrid_keeps_the_union_of_top_k_and_top_p(rng):
    problem, layout = AttentionProblem(1, 2, 512, 512, 8), TokenLayout((8, 8, 8), block=16, sink=None)
    q, k = (3 * rng.standard_normal((1, 2, 512, 8), dtype=np.float32) for _ in range(2))
    kept = {
        policy: lower(plan(problem, layout, policy, returns=["%mask"]), backend="reference")(q, k).blocks
        for policy in (TopK(0.8), TopP(0.3), Hybrid(0.8, 0.3))
    }
    by_count, by_mass, both = kept.values()
    np.testing.assert_array_equal(both, by_count | by_mass)
    assert both.sum() > max(by_count.sum(), by_mass.sum())


@pytest.mark.parametrize(
    ("sink", "sparsity", "free", "share"),
    [("first_frame", 0.8, 64.8, 0.48), ("first_frame", 0.9, 2.7, 0.96), ("first_frame_keys", 0.9, 30.1, 0.49)],
)
def test_a_plan_says_what_protection_takes_and_what_is_left(sink, sparsity, free, share):
    problem, layout = AttentionProblem(1, 1, 75600, 75600, 128), TokenLayout((21, 45, 80), sink=sink)
    planned = quietly(problem, layout, TopK(sparsity))
    assert planned.sparsity == pytest.approx(sparsity, abs=1e-5)
    assert planned.free_blocks_a_row == pytest.approx(free, abs=0.1)
    assert planned.protected_share == pytest.approx(share, abs=0.01)
    assert f"protected={planned.protected_share:.2f}" in str(planned)


def test_a_warning_names_the_cure_where_protection_takes_most():
    problem, layout = AttentionProblem(1, 1, 75600, 75600, 128), TokenLayout((21, 45, 80))
    with pytest.warns(SparsityWarning, match=r"protection \(first frame\) takes 96% .* sink='first_frame_keys'"):
        plan(problem, layout, TopK(0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(problem, layout, TopK(0.8))
        plan(problem, TokenLayout((21, 45, 80), sink="first_frame_keys"), TopK(0.9))
