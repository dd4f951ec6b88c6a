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
from rainfusion.core import semantics
from rainfusion.core.errors import PolicyError
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.policy import Fixed

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
    quotas = policy.row_quotas(**sides)
    expected = np.ones(score.shape, dtype=bool)
    for b, h, i in np.ndindex(*score.shape[:2], sides["q"].free_blocks):
        free = score[b, h, i, : sides["kv"].free_blocks]
        expected[b, h, i, : free.size] = np.isin(np.arange(free.size), ranked(free)[: quotas[i]])
    for array, constant in ((score, None), (torch.from_numpy(score), torch.from_numpy(quotas))):
        kept = semantics.select(array, policy=policy, **sides, constant=constant)
        np.testing.assert_array_equal(np.asarray(kept), expected)


def test_libraries_agree_on_many_rows_full_of_ties(rng):
    score = rng.integers(-3, 4, (2, 3, 64, 301)).astype(np.float32)
    sides = axes(score, 2, 5)
    ours, theirs = (semantics.select(s, policy=TopK(0.83), **sides) for s in (score, torch.from_numpy(score)))
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert ours.sum(axis=(2, 3)).tolist() == [[round(0.17 * 64 * 301)] * 3] * 2


def test_selection_leaves_the_scores_alone(rng):
    score = rng.standard_normal((1, 1, 4, 8))
    score[0, 0, 0, 0] = np.nan
    before = score.copy()
    semantics.select(score, policy=TopK(0.5), **axes(score))
    np.testing.assert_array_equal(score, before)


def test_a_policy_that_ranks_nothing_is_refused():
    score = np.zeros((1, 1, 2, 2))
    with pytest.raises(PolicyError, match="fixed selects nothing by score"):
        semantics.select(score, policy=Fixed(), **axes(score))
