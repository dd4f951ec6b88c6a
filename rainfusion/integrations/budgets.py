"""How a budget is spread over heads: the shares to skip that cost the least error, at a given mean share.

Every head has a curve of error against the share that it skips. On the lower convex hulls of these curves, taking the
cheapest step of any head first is the optimum of the linear program: at most one head ends between two measured shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

_NOTHING = 1e-9  # of a share: what rounding leaves


def solve(errors: np.ndarray, shares: Sequence[float], sparsity: float) -> np.ndarray:
    """The share of every curve, their mean `sparsity`, that minimises the sum of the errors.

    Args:
        errors: ``[curves, points]``, 0 at the first and nowhere negative. Curves may fall: where attention is
            diffuse, more of the best blocks can err more than fewer.
        shares: ascending from 0 on, ``[points]``.
        sparsity: at most the last of the shares.

    Returns:
        float64 ``[curves]``.
    """
    steps = sorted(
        (slope, curve, start, end)
        for curve, row in enumerate(errors.tolist())
        for slope, start, end in _hull_steps(shares, row)
    )
    found, left = np.zeros(len(errors)), sparsity * len(errors)
    for _, curve, start, end in steps:
        if left < _NOTHING:
            break
        found[curve] = end if left > end - start - _NOTHING else start + left
        left -= found[curve] - start
    return found


def _hull_steps(shares: Sequence[float], errors: Sequence[float]) -> list[tuple[float, float, float]]:
    """The edges of the lower convex hull of a curve: (slope, start, end), slopes ascending."""
    hull: list[int] = []
    for point in range(len(shares)):
        while len(hull) > 1 and _slope(shares, errors, hull[-1], point) <= _slope(shares, errors, hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return [(_slope(shares, errors, a, b), shares[a], shares[b]) for a, b in pairwise(hull)]


def _slope(shares: Sequence[float], errors: Sequence[float], a: int, b: int) -> float:
    return (errors[b] - errors[a]) / (shares[b] - shares[a])


def shares_of_heads(errors: np.ndarray, shares: Sequence[float], sparsity: float, ranks: int) -> np.ndarray:
    """The shares of all heads of a model.

    Args:
        errors: ``[layers, heads, points]``; shares, sparsity: as in `solve`.
        ranks: devices that each hold consecutive heads of every layer, as Ulysses splits them, and are to carry equal
            work in every layer. Divides the number of heads.

    Returns:
        float64 ``[layers, heads]``, their mean `sparsity`.
    """
    layers, heads, points = errors.shape
    groups = np.stack([groups_of_heads(layer, shares, sparsity, ranks) for layer in errors])
    members = np.take_along_axis(errors, groups.reshape(layers, heads, 1), axis=1)
    curves = members.reshape(-1, ranks, points).sum(axis=1)
    of_groups = np.repeat(solve(curves, shares, sparsity), ranks).reshape(layers, heads)
    found = np.empty((layers, heads))
    np.put_along_axis(found, groups.reshape(layers, heads), of_groups, axis=1)
    return found


def groups_of_heads(errors: np.ndarray, shares: Sequence[float], sparsity: float, ranks: int) -> np.ndarray:
    """Heads of a layer that share a budget: one of every rank, alike in their error at `sparsity`.

    Args:
        errors: ``[heads, points]``.

    Returns:
        int64 ``[heads / ranks, ranks]``, the numbers of the heads.
    """
    at_sparsity = np.array([np.interp(sparsity, shares, curve) for curve in errors]).reshape(ranks, -1)
    first = np.arange(ranks)[:, None] * at_sparsity.shape[1]
    return (np.argsort(at_sparsity, axis=1, kind="stable") + first).T
