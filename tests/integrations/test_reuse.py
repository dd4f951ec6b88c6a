"""Masks used again by drift: which heads are selected anew, and with what result."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rainfusion import BlockMask, Grid, Text, TokenLayout
from rainfusion.integrations import reuse
from rainfusion.integrations.clock import Moment
from rainfusion.integrations.drift import Means, Sampler, drift, sampled_tokens
from rainfusion.integrations.report import Report
from rainfusion.integrations.reuse import HeadMasks, replaced, rounded, taken
from tests.integrations.heads import Heads, changed, check_heads_on_their_own, tensors


@pytest.fixture
def heads(monkeypatch):
    return lambda *like, **settings: Heads(monkeypatch, *like, **settings)


@pytest.mark.parametrize("backend", ["reference", "torch", "openvino"])
@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_a_head_is_selected_anew_on_its_own(heads, backend, omitted):
    like = np.asarray
    if backend == "openvino":
        pytest.importorskip("openvino")
    if backend == "torch":
        like = torch.from_numpy
    check_heads_on_their_own(heads(like, backend, omitted=omitted), tensors(), 2e-5)


def test_keys_count_as_queries_do(heads):
    made = heads()
    made.forward(0, tensors())
    made.forward(1, changed(tensors(), 2, what=1))
    assert made.selected == [4, 1]


def test_what_does_not_move_is_used_again_even_without_any_drift(heads):
    made = heads(reuse_drift=0)
    for step in range(9):
        made.forward(step, tensors())
    assert made.reused() == [0.0] + [1.0] * 8
    made.forward(9, tensors())
    assert made.reused()[-1] == 0.0


@pytest.mark.parametrize(("limit", "reused"), [(0.15, 0.75), (0.25, 1.0)])
def test_the_limit_is_the_relative_change(heads, limit, reused):
    """Queries and keys of a head grow by a tenth: its drift is 0.2."""
    made, qkv = heads(reuse_drift=limit), tensors()
    made.forward(0, qkv)
    larger = [x.copy() for x in qkv]
    for x in larger[:2]:
        x[:, :, 0] *= 1.1
    made.forward(1, tuple(larger))
    assert made.reused() == [0, reused]


def test_drift_is_measured_from_when_the_mask_was_made(heads):
    """Small steps add up; a refreshed head starts again."""
    made, reused = heads(reuse_drift=0.1), []
    q, k, v = tensors()
    for step in range(6):
        q = q.copy()
        q[:, :, 0] *= 1.04 if step else 1
        made.forward(step, (q, k, v))
        reused.append(made.reused()[-1])
    assert reused == [0, 1, 1, 0.75, 1, 1]


def test_heads_have_ages_of_their_own(heads):
    made, qkv = heads(refresh_every=3), tensors()
    for step in range(6):
        made.forward(step, changed(qkv, 2, 3) if step else qkv)
    assert made.reused() == [0, 0.5, 1, 0.5, 0.5, 1]


def test_heads_are_selected_in_powers_of_two(heads):
    """Three that are to be selected anew are filled up by the one that has drifted most of the others."""
    made, qkv = heads(refresh_every=20), tensors(heads=6)
    made.forward(0, qkv)
    moved = changed(qkv, 0, 2, 5)
    moved[0][:, :, 4] *= 1.01
    made.forward(1, moved)
    assert made.selected == [6, 4]
    np.testing.assert_array_equal(made.used(), made.mask_of(moved))
    made.forward(2, changed(moved, *range(5), seed=5))
    assert made.selected == [6, 4, 6]


def test_contexts_have_masks_apart(heads):
    made = heads()
    for step in range(3):
        made.forward(step, changed(tensors(), 0, seed=step), "cond")
        made.forward(step, tensors(seed=1), "uncond")
    assert made.reused() == [0, 0, 0.75, 1, 0.75, 1]


def test_a_shared_mask_is_watched_in_the_context_that_made_it(heads):
    made = heads(share_masks=True)
    for step in range(3):
        made.forward(step, tensors(), "cond")
        made.forward(step, tensors(seed=1 + step), "uncond")
    assert made.reused() == [0, 1, 1, 1, 1, 1]
    made.forward(3, changed(tensors(), 0), "cond")
    made.forward(3, tensors(), "uncond")
    assert made.reused()[-2:] == [0.75, 1]


def test_a_shared_mask_that_is_old_is_made_by_whichever_context_comes(heads):
    made = heads(share_masks=True, refresh_every=2)
    made.forward(0, tensors(), "cond")
    made.forward(2, tensors(seed=1), "uncond")
    made.forward(3, tensors(), "cond")  # differs from the other context, and is not compared with it
    made.forward(3, changed(tensors(seed=1), 1), "uncond")
    assert made.reused() == [0, 0, 1, 0.75]


def test_a_run_begins_without_masks(heads):
    made = heads()
    made.forward(3, tensors())
    made.forward(4, tensors())
    made.forward(0, tensors())
    made.engine.reset()
    made.forward(1, tensors())
    assert made.reused() == [0, 1, 0, 0]


def test_a_step_that_begins_again_is_selected_anew(heads):
    made = heads()
    made.forward(0, tensors())
    made.forward(0, tensors(), "")
    assert made.reused() == [0, 0]


def test_the_sample_of_a_batch_that_drifts_most_decides(heads):
    made, qkv = heads(), tensors(batch=3)
    made.forward(0, qkv)
    moved = changed(qkv, 3, sample=1)
    made.forward(1, moved)
    assert made.selected == [4, 1]
    np.testing.assert_array_equal(made.used()[:, 3], made.mask_of(moved)[:, 3])
    np.testing.assert_array_equal(made.used()[:, :3], made.mask_of(qkv)[:, :3])


def test_heads_that_share_keys_drift_with_them(heads):
    made, qkv = heads(), tensors(heads=6, kv_heads=3)
    made.forward(0, qkv)
    moved = changed(qkv, 1, what=1)
    made.forward(1, moved)
    assert made.selected == [6, 2]
    np.testing.assert_array_equal(made.used()[:, 2:4], made.mask_of(moved)[:, 2:4])
    moved = changed(moved, 1, 4)
    made.forward(2, moved)
    np.testing.assert_array_equal(made.used()[:, [1, 4]], made.mask_of(moved)[:, [1, 4]])


def test_heads_keep_their_own_shares(heads):
    made, qkv = heads(sparsity=(0.25, 0.5, 0.75, 0.0)), tensors()
    made.forward(0, qkv)
    moved = changed(qkv, 1, 2)
    made.forward(1, moved)
    assert made.selected == [4, 2]
    np.testing.assert_array_equal(made.used()[:, 1:3], made.mask_of(moved)[:, 1:3])
    made.forward(2, changed(moved, 3, 0))
    assert made.reused() == [0, 0.5, 0.5]
    assert made.used()[:, 3].all()


def test_padded_tokens_take_no_part_in_what_is_selected_anew(heads):
    made, qkv = heads(), tensors(batch=2)
    lengths = np.asarray([128, 70], dtype=np.int32)
    made.forward(0, qkv, kv_lengths=lengths)
    moved = changed(qkv, 0)
    made.forward(1, moved, kv_lengths=lengths)
    assert made.selected == [4, 1]
    np.testing.assert_array_equal(made.used()[:, 0], made.mask_of(moved, kv_lengths=lengths)[:, 0])


def test_a_head_whose_drift_is_no_number_is_selected_anew(heads):
    made, qkv = heads(), tensors()
    for x in qkv[:2]:
        x[:, :, 2] = math.nan
    made.forward(0, qkv)
    made.forward(1, qkv)
    assert made.selected == [4, 1]


def test_a_head_of_zeros_drifts_when_it_is_zero_no_more(heads):
    made, qkv = heads(), tensors()
    for x in qkv[:2]:
        x[:, :, 2] = 0
    made.forward(0, qkv)
    made.forward(1, qkv)
    assert made.selected == [4]
    made.forward(2, tensors())
    assert made.selected == [4, 1]


def test_without_a_limit_nothing_is_measured(heads, monkeypatch):
    monkeypatch.setattr(Sampler, "means", lambda *_: pytest.fail("measured"))
    made = heads(reuse_drift=None, refresh_every=2)
    for step in range(4):
        made.forward(step, tensors(seed=step))
    assert made.reused() == [0, 1, 0, 1]


# -- drifts that arrive late ---------------------------------------------------------------------------


class Late:
    """Numbers that arrive some steps after they were measured."""

    def __init__(self, monkeypatch, steps):
        self.now = 0
        self.awaited = 0
        monkeypatch.setattr(reuse, "arriving", self.arriving)
        self.steps = steps

    def arriving(self, numbers):
        due, values = self.now + self.steps, [float(number) for number in numbers]
        self.awaited += 1
        return lambda: values if self.now >= due else None


@pytest.mark.parametrize(("late", "reused"), [(0, 0.75), (1, 1.0)])
def test_the_newest_drift_that_has_arrived_decides(heads, monkeypatch, late, reused):
    made, clock = heads(), Late(monkeypatch, late)
    qkv = tensors()
    made.forward(0, qkv)
    clock.now = 1
    made.forward(1, changed(qkv, 1))
    assert made.reused()[-1] == reused
    clock.now = 2
    made.forward(2, changed(qkv, 1))
    assert made.reused()[-1] == 1.75 - reused
    clock.now = 3
    made.forward(3, changed(qkv, 1))  # what was measured against the mask before is of no use now
    assert made.reused()[-1] == 1
    np.testing.assert_array_equal(made.used()[:, 1], made.mask_of(changed(qkv, 1))[:, 1])


def test_until_a_drift_arrives_age_decides_and_none_is_awaited_longer_than_a_mask_lives(heads, monkeypatch):
    made = heads(refresh_every=3)
    Late(monkeypatch, 99)
    for step in range(12):
        made.forward(step, tensors(seed=step))
        ((_, masks),) = made.engine._masks._places.items()
        assert len(masks._readings._measured) <= 2
    assert made.reused() == [0, 1, 1] * 4


# -- the state of one place ----------------------------------------------------------------------------

HEADS = 5
events = st.lists(
    st.tuples(
        st.integers(0, 2),  # steps since the last call
        st.sampled_from(["cond", "uncond"]),
        st.lists(st.floats(0.5, 2), min_size=HEADS, max_size=HEADS),
    ),
    max_size=12,
)


@given(events, st.integers(1, 5), st.floats(0, 2))
def test_a_place_follows_the_rule(steps, every, limit):
    """Against the rule as it is written, head by head; a mask carries the number of the call that made it."""
    place = HeadMasks(HEADS, every, limit)
    made = [None] * HEADS  # of each head: step, context, mean, call
    step = 0
    for number, (more, context, values) in enumerate(steps, start=1):
        step += more
        means = Means(*(np.asarray(values).reshape(1, 1, HEADS, 1) for _ in range(2)))
        stale = place.stale(Moment(0, step, None, context), lambda means=means: means)
        needed = {head for head, value in enumerate(values) if is_due(made[head], step, context, value, every, limit)}
        assert needed <= {*stale}
        assert len(stale) == (0 if not needed else min(2 ** math.ceil(math.log2(len(needed))), HEADS))
        if stale:
            bits = np.unpackbits(np.uint8([number]), bitorder="little").astype(bool)
            mask = BlockMask(np.broadcast_to(bits, (1, len(stale), 1, 8)), 1, 8, (1, 1))
            place.put(stale, mask, Moment(0, step, None, context), lambda means=means: means)
        for head in stale:
            made[head] = step, context, values[head], number
        numbers = np.packbits(place.mask.blocks, axis=-1, bitorder="little").ravel()
        assert [*numbers] == [call for *_, call in made]


def is_due(made, step, context, value, every, limit):
    if made is None or step - made[0] >= every or made[:2] == (step, context):
        return True
    return made[1] == context and 2 * (abs(value - made[2]) / made[2]) > limit


@given(st.data())
def test_entries_are_taken_and_replaced_by_slices(data):
    size = data.draw(st.integers(1, 9))
    x, y = np.arange(2 * size).reshape(2, size), -1 - np.arange(2 * size).reshape(2, size)
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=12))
    np.testing.assert_array_equal(taken(x, places, 1), x[:, places])
    ascending = sorted({*places})
    expected = x.copy()
    expected[:, ascending] = y[:, ascending]
    np.testing.assert_array_equal(replaced(x, y, ascending, 1, whole=True), expected)
    np.testing.assert_array_equal(replaced(x, y[:, ascending], ascending, 1), expected)


def test_numbers_of_heads():
    assert [rounded(n, 12) for n in range(13)] == [0, 1, 2, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]


# -- the sample ----------------------------------------------------------------------------------------


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12)),
    st.integers(0, 40),
    st.sampled_from([4, 16, (16, 4)]),
    st.sampled_from([None, "first_frame", "first_frame_keys"]),
    st.sampled_from([0, 1]),
)
def test_the_sample_is_whole_unprotected_blocks(grid, text, block, sink, side):
    layout = TokenLayout(parts=(Text(text), Grid(*grid, sink=sink)), block=block)
    length = layout.length
    axis = layout.axis(length, side)
    given_order, places = (sampled_tokens(layout, length, side, order) for order in ("given", "window"))
    np.testing.assert_array_equal(layout.order[given_order] if axis.ordered else given_order, places)
    assert len({*places.ravel()}) == places.size
    whole = min(axis.free_blocks, length // axis.block)
    if whole:
        blocks = given_order[:, 0] // axis.block
        np.testing.assert_array_equal(given_order, blocks[:, None] * axis.block + np.arange(axis.block))
        assert blocks.max() < whole
        assert min(whole, 4) <= len(blocks) <= max(7, whole // 8)
    else:
        assert places.shape == (1, min(axis.block, length))


def test_the_sample_is_of_all_columns_of_a_picture():
    """Whose rows are 8 windows wide."""
    layout = TokenLayout((4, 64, 64), block=64, window=(1, 8, 8), sink=None)
    tokens = sampled_tokens(layout, layout.length, 0, "window")
    assert len(tokens) == 32
    assert {*(tokens % 64 // 8).ravel()} == {*range(8)}


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_drift_is_the_definition(library):
    layout = TokenLayout((4, 8, 8), block=16, sink=None)
    rng = np.random.default_rng(0)
    calls = [[rng.standard_normal((2, 256, heads, 8)) for heads in (4, 2)] for _ in range(2)]
    sampler = Sampler()
    new, old = (sampler.means(*map(library, call), layout, "window") for call in calls)
    got = drift(new, old)
    sample = sampled_tokens(layout, 256, 0, "given")[:, 0] // 16
    blocks = [[layout.to_blocks(x, axis=1).reshape(2, 16, 16, -1, 8)[:, sample].mean(2) for x in c] for c in calls]
    blocks = [[q, k.repeat(2, axis=2)] for q, k in blocks]
    norms = [np.sqrt(((n - o) ** 2).sum((1, 3)) / (o**2).sum((1, 3))) for n, o in zip(*blocks, strict=True)]
    np.testing.assert_allclose(np.asarray(got), (norms[0] + norms[1]).max(axis=0), rtol=1e-12)


# -- around it -----------------------------------------------------------------------------------------


def test_nothing_that_drift_does_waits_for_a_device():
    done = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            done.append(operator.overloadpacket.__name__)
            return operator(*args, **kwargs or {})

    sampler, layout = Sampler(), TokenLayout((2, 8, 8), block=16, sink=None)
    q = torch.randn(1, 128, 4, 8)
    reference = sampler.means(q, q, layout, "window")
    with Watch():
        drift(sampler.means(q + 1, q, layout, "window"), reference)
    assert "sum" in done
    assert not {*done} & {"_local_scalar_dense", "nonzero", "index", "masked_select", "lift_fresh", "_to_copy"}


def test_the_report_says_how_many_masks_were_used_again(heads):
    made, qkv = heads(), tensors()
    for step in range(4):
        made.forward(step, changed(qkv, 1) if step else qkv)
    report = made.report()
    assert report.reused == pytest.approx((0 + 0.75 + 1 + 1) / 4)
    assert report.count(kind="reused") == 3
    assert Report.from_json(report.to_json()) == report
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert lines[0] == ("4 attention calls: 1 sparse, 3 reused; density 0.500; 69% of the heads' masks used again")
    assert lines[1] == "model run context steps layers density why dense reused"
    assert lines[2:] == ["model 0 0 1 sparse 0.500 0%", "model 0 1 to 3 1 reused 0.500 92%"]


def test_a_copy_of_an_engine_has_no_masks(heads):
    made = heads()
    made.forward(0, tensors())
    assert len(made.engine._masks) == 1
    assert len(copy.deepcopy(made.engine)._masks) == 0
