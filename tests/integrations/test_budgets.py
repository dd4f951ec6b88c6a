"""The solver against the linear program, against every discrete choice, and with ranks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rainfusion.integrations.budgets import groups_of_heads, shares_of_heads, solve

SHARES = (0.0, 0.5, 0.7, 0.8, 0.9)
SPARSITIES = st.floats(0, SHARES[-1])
ERRORS = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1e-9])


@st.composite
def curves(draw, most=4):
    """Errors that begin at 0, ``[curves, points]``; some of them fall somewhere."""
    count = draw(st.integers(1, most))
    rows = draw(st.lists(st.lists(ERRORS, min_size=4, max_size=4), min_size=count, max_size=count))
    return np.array([[0.0, *row] for row in rows])


def least(errors, sparsity):
    """The optimum of the linear program over mixtures of the measured points of every curve."""
    optimize = pytest.importorskip("scipy.optimize")
    n, points = errors.shape
    one_each = np.kron(np.eye(n), np.ones(points))
    found = optimize.linprog(
        errors.ravel(),
        A_eq=np.vstack([one_each, np.tile(SHARES, n)]),
        b_eq=[*np.ones(n), sparsity * n],
    )
    assert found.status == 0
    return found.fun


def hull_cost(errors, shares):
    """The error at shares on the lower hulls of the curves."""
    return sum(
        min(
            a + (b - a) * (share - s) / (t - s) if t > s else a
            for (s, a), (t, b) in product(zip(SHARES, row, strict=True), repeat=2)
            if s <= share <= t and (t > s or s == share)
        )
        for row, share in zip(errors, shares, strict=True)
    )


@given(curves(), SPARSITIES)
def test_the_solution_is_the_linear_programs(errors, sparsity):
    shares = solve(errors, SHARES, sparsity)
    assert shares.mean() == pytest.approx(sparsity, abs=1e-8)
    assert ((shares >= 0) & (shares <= SHARES[-1])).all()
    assert hull_cost(errors, shares) == pytest.approx(least(errors, sparsity), abs=1e-7)


@given(curves(), SPARSITIES)
def test_no_choice_of_measured_shares_is_better(errors, sparsity):
    chosen = hull_cost(errors, solve(errors, SHARES, sparsity))
    for points in product(range(len(SHARES)), repeat=len(errors)):
        if np.mean([SHARES[p] for p in points]) >= sparsity - 1e-9:
            assert chosen <= sum(row[p] for row, p in zip(errors, points, strict=True)) + 1e-7


@given(curves(most=6), SPARSITIES)
def test_at_most_one_curve_ends_between_two_measured_shares(errors, sparsity):
    shares = solve(errors, SHARES, sparsity)
    assert sum(min(abs(share - s) for s in SHARES) > 1e-8 for share in shares) <= 1


def test_a_head_that_errs_more_skips_less():
    errors = np.outer([4.0, 1.0, 0.1], [0, 0.1, 0.3, 0.6, 1])
    shares = solve(errors, SHARES, 0.7)
    assert shares.tolist() == sorted(shares)
    assert shares[0] < 0.7 < shares[2]


@given(st.integers(1, 3), st.sampled_from([(1, 1), (1, 3), (2, 4), (3, 6), (4, 4)]), SPARSITIES, st.integers(0, 99))
def test_ranks_carry_equal_work_in_every_layer(layers, heads_of_ranks, sparsity, seed):
    ranks, heads = heads_of_ranks
    errors = np.random.default_rng(seed).random((layers, heads, len(SHARES))).cumsum(axis=2)
    shares = shares_of_heads(errors, SHARES, sparsity, ranks)
    assert shares.mean() == pytest.approx(sparsity, abs=1e-8)
    work = shares.reshape(layers, ranks, heads // ranks).sum(axis=2)
    np.testing.assert_allclose(work, work[:, :1].repeat(ranks, axis=1), atol=1e-9)


def test_a_group_has_a_head_of_every_rank_alike_in_error():
    errors = np.array([[0, e] for e in (3.0, 1.0, 2.0, 10.0, 30.0, 20.0)])
    assert groups_of_heads(errors, (0.0, 0.9), 0.8, ranks=2).tolist() == [[1, 3], [2, 5], [0, 4]]


def test_more_ranks_never_cost_less():
    errors = np.random.default_rng(0).random((2, 8, len(SHARES))).cumsum(axis=2)
    errors[:, :, 0] = 0

    def cost(ranks):
        return hull_cost(errors.reshape(16, -1), shares_of_heads(errors, SHARES, 0.7, ranks).ravel())

    assert cost(1) <= cost(2) + 1e-9
    assert cost(1) < hull_cost(errors.reshape(16, -1), [0.7] * 16)
