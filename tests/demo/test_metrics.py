import numpy as np
import pytest

import rainfusion
from rainfusion.core.layout import Grid, Text, TokenLayout, Tokens
from rainfusion.demo import metrics

PARTS = TokenLayout(parts=(Text(5), Grid(3, 4, 5, sink="last_frame_keys"), Tokens(9), Grid(1, 3, 7)), block=16)
LAYOUTS = [
    TokenLayout((3, 4, 8), block=16),
    TokenLayout((3, 5, 7), text=6, block=16),
    TokenLayout((2, 5, 7), text=6, text_position="start", block=(16, 32), sink=None),
]


def problem(layout, seed=0):
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((1, 2, layout.length, 8), np.float32) for _ in range(3))


def dense_weights(q, k, layout, scale):
    logits = q[:, :, layout.order] @ k[:, :, layout.order].swapaxes(2, 3) * scale
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("layout", [*LAYOUTS, PARTS], ids=str)
def test_block_mass_and_recall_are_those_of_the_whole_matrix(layout):
    q, k, v = problem(layout)
    made = rainfusion.plan(rainfusion.AttentionProblem.from_tensors(q, k, v), layout, rainfusion.TopK(0.3))
    mask = rainfusion.select(q, k, parts=layout.parts, block=layout.block, sparsity=0.3, backend="reference")
    weights = dense_weights(q, k, layout, made.problem.scale)
    mass = metrics.block_mass(q, k, layout, made.problem.scale)
    assert np.allclose(mass.sum(axis=-1), 1)
    rows, columns = layout.block
    assert mass[0, 1, 1, 2] == pytest.approx(
        weights[0, 1, rows : 2 * rows, 2 * columns : 3 * columns].sum() / rows, rel=1e-4
    )
    kept = (weights * mask.to_dense()).sum(axis=(0, 2, 3)) / layout.length
    assert np.allclose(metrics.recall(mass, mask.blocks, made.q_axis.counts), kept, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_raster_is_raster_with_the_same_protection(layout):
    plain, video = metrics.raster(layout), layout.length - layout.text
    assert plain.protected == layout.protected
    assert plain.block == layout.block
    free = plain.protected[0].start if plain.protected else plain.length
    assert np.all(np.diff(plain.order[:free]) == 1)
    assert sorted(plain.order[:video]) == sorted(layout.order[:video])


def test_raster_of_parts_keeps_what_is_protected():
    plain = metrics.raster(PARTS)
    assert plain.protected == PARTS.protected
    free = plain.protected[0].start
    assert sorted(plain.order[:free]) == sorted(PARTS.order[:free])
    assert np.array_equal(plain.order[: 2 * 20], np.arange(5, 45))


@pytest.mark.parametrize("width", [15, 16, 17, 32])
def test_raster_is_raster_for_any_width(width):
    order = metrics.raster(TokenLayout((2, 3, width), block=16, sink=None)).order
    assert np.array_equal(order, np.arange(6 * width))


def test_rivals_keep_as_many_blocks_and_the_oracle_most_mass():
    layout = LAYOUTS[1]
    q, k, v = problem(layout)
    made = rainfusion.plan(rainfusion.AttentionProblem.from_tensors(q, k, v), layout, rainfusion.TopK(0.3))
    sides = made.q_axis, made.kv_axis
    scores = metrics.block_scores(q, k, layout, made.problem.scale)
    run = rainfusion.lower(
        rainfusion.plan(made.problem, layout, rainfusion.TopK(0.3), returns=("%out", "%mask")), backend="reference"
    )
    mask = run(q, k, v)[1].blocks
    assert np.array_equal(metrics.most_of(scores, mask, sides), mask)
    other = metrics.most_of(-scores, mask, sides)
    assert np.array_equal(other.sum(axis=-1), mask.sum(axis=-1))
    assert other[..., sides[1].free_blocks :].all()
    found, _ = metrics.attention_recall(q, k, layout, mask, made.problem.scale)
    for rival in (found.plan, found.random):
        assert np.all(rival <= found.oracle + 1e-9)


def test_block_mass_of_torch_tensors_is_that_of_numpy():
    torch = pytest.importorskip("torch")
    layout = LAYOUTS[1]
    q, k, _ = problem(layout)
    ours = metrics.block_mass(torch.from_numpy(q), torch.from_numpy(k), layout, 0.3)
    assert np.allclose(ours, metrics.block_mass(q, k, layout, 0.3), atol=1e-6)


def test_errors():
    dense = np.ones((1, 2, 3, 4))
    out = dense.copy()
    out[:, :, 1] = 0.5
    assert metrics.relative_l1(out, dense) == pytest.approx(1 / 6)
    assert metrics.token_error(out, dense).tolist() == [0, 0.5, 0]
    assert metrics.cosine(3 * dense, dense) == pytest.approx(1)
