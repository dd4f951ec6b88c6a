"""Law 2: exactly k blocks a row, ties to the lower index, whatever the scores and the array library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rainfusion import TopK
from rainfusion.core import ops
from rainfusion.core.layout import BlockedAxis

awkward = st.sampled_from([-math.inf, -2.0, -1.0, -0.0, 0.0, 1.0, 1.0, 2.0, math.inf, math.nan])
scores = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 6), st.integers(1, 9)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=awkward)
)


def axes(score, protected_rows=0, protected_columns=0):
    rows, columns = score.shape[2:]
    return {
        "q": BlockedAxis(rows, 1, True, rows - protected_rows),
        "kv": BlockedAxis(columns, 1, True, columns - protected_columns),
    }


def ranked(row) -> list[int]:
    """Columns from best to worst; NaN is worst of all but equal to minus infinity, ties by index."""
    return sorted(range(len(row)), key=lambda j: (-(-math.inf if math.isnan(row[j]) else float(row[j])), j))


@settings(max_examples=200)
@given(scores, st.floats(0, 1, exclude_max=True), st.integers(0, 3), st.integers(0, 3), st.sampled_from(["f4", "f8"]))
@example(np.zeros((1, 1, 3, 7), np.float32), 0.5, 0, 0, "f4")
@example(np.array([[[[-0.0, 0.0, -0.0, 0.0]]]], np.float32), 0.5, 0, 0, "f4")
@example(np.full((1, 1, 2, 5), math.nan, np.float32), 0.7, 0, 1, "f4")
def test_exactly_the_quota_of_best_blocks_with_ties_to_the_lower_index(score, sparsity, rows, columns, dtype):
    score = score.astype(dtype)
    sides = axes(score, min(rows, score.shape[2]), min(columns, score.shape[3]))
    policy = TopK(sparsity)
    quotas = policy.budget(**sides, heads=1).quotas
    expected = np.ones(score.shape, dtype=bool)
    for b, h, i in np.ndindex(*score.shape[:2], sides["q"].free_blocks):
        free = score[b, h, i, : sides["kv"].free_blocks]
        expected[b, h, i, : free.size] = np.isin(np.arange(free.size), ranked(free)[: quotas[0, i]])
    for array, given_quotas in ((score, quotas), (torch.from_numpy(score), torch.from_numpy(quotas))):
        kept = ops.select(array, given_quotas, **sides)
        np.testing.assert_array_equal(np.asarray(kept), expected)


def test_libraries_agree_on_many_rows_full_of_ties(rng):
    score = rng.integers(-3, 4, (2, 3, 64, 301)).astype(np.float32)
    sides = axes(score, 2, 5)
    quotas = TopK(0.83).budget(**sides, heads=3).quotas
    pairs = (score, quotas), (torch.from_numpy(score), torch.from_numpy(quotas))
    ours, theirs = (ops.select(*pair, **sides) for pair in pairs)
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert ours.sum(axis=(2, 3)).tolist() == [[round(0.17 * 64 * 301)] * 3] * 2


def test_selection_leaves_the_scores_alone(rng):
    score = rng.standard_normal((1, 1, 4, 8))
    score[0, 0, 0, 0] = np.nan
    before = score.copy()
    ops.select(score, np.full((1, 4), 2), **axes(score))
    np.testing.assert_array_equal(score, before)


@settings(max_examples=100)
@given(scores, st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_every_head_has_quotas_of_its_own(score, rows, columns, seed):
    sides = axes(score, min(rows, score.shape[2]), min(columns, score.shape[3]))
    heads, free = score.shape[1], sides["q"].free_blocks
    quotas = np.random.default_rng(seed).integers(-2, score.shape[3] + 3, (heads, free))
    together = ops.select(score, quotas, **sides)
    for h in range(heads):
        alone = ops.select(score[:, h : h + 1], quotas[h : h + 1], **sides)
        np.testing.assert_array_equal(together[:, h : h + 1], alone)
    counts = together[:, :, :free, : sides["kv"].free_blocks].sum(axis=-1)
    np.testing.assert_array_equal(counts, np.broadcast_to(np.clip(quotas, 0, sides["kv"].free_blocks), counts.shape))


@settings(max_examples=100)
@given(scores, st.integers(0, 9), st.integers(0, 3))
def test_counting_over_all_columns_adds_protection_on_top(score, quota, columns):
    """As the published code does, pair for pair: the best of all columns, united with the protected ones."""
    sides = axes(score, 0, min(columns, score.shape[3]))
    kept = ops.select(score, np.full((1, score.shape[2]), quota), **sides, over="all")
    for b, h, i in np.ndindex(*score.shape[:3]):
        expected = {*ranked(score[b, h, i])[:quota], *range(sides["kv"].free_blocks, score.shape[3])}
        assert {*np.flatnonzero(kept[b, h, i])} == expected


@settings(max_examples=100)
@given(scores, st.floats(0, 1), st.integers(0, 9), st.integers(0, 3), st.sampled_from(["free", "all"]))
def test_a_mass_beside_quotas_keeps_the_union_of_both(score, mass, quota, columns, over):
    sides = axes(score, 0, min(columns, score.shape[3]))
    quotas, none = np.full((1, score.shape[2]), quota), np.zeros((1, score.shape[2]), int)
    with np.errstate(all="ignore"):
        both = ops.select(score, quotas, **sides, mass=mass, over=over)
        by_mass = ops.select(score, none, **sides, mass=mass)
    np.testing.assert_array_equal(both, by_mass | ops.select(score, quotas, **sides, over=over))


@pytest.mark.parametrize("mass", [None, 0.7])
def test_columns_beyond_a_length_are_taken_last_and_weigh_nothing(rng, mass):
    score = rng.standard_normal((2, 3, 4, 6)).astype(np.float32)
    sides = {"q": BlockedAxis(16, 4, True, 16), "kv": BlockedAxis(23, 4, True, 23)}
    lengths = np.array([9, 23], dtype=np.int32)
    quotas = np.full((1, 4), 2)
    with np.errstate(divide="ignore"):
        kept = ops.select(score, quotas, lengths, **sides, mass=mass)
        torch_kept = ops.select(*(torch.from_numpy(x) for x in (score, quotas, lengths)), **sides, mass=mass)
    np.testing.assert_array_equal(kept, torch_kept)
    assert not kept[0, ..., 3:].any(), "nine tokens are three blocks of four"
    short = {"q": sides["q"], "kv": BlockedAxis(9, 4, True, 9)}
    np.testing.assert_array_equal(kept[0, ..., :3], ops.select(score[:1, ..., :3], quotas, **short, mass=mass)[0])
    np.testing.assert_array_equal(kept[1], ops.select(score[1:], quotas, **sides, mass=mass)[0])
