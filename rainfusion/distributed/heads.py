"""Heads spread over ranks: which rank has which, so that all have equal work, and the policy of some of the heads."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from rainfusion.core.layout import BlockedAxis
from rainfusion.core.ops import Op
from rainfusion.core.policies import Budget, Policy

Heads = tuple[int, ...]


def deal(costs: Sequence[int], world: int) -> tuple[Heads, ...]:
    """The heads of every rank, ascending; every rank has at least one where there are as many.

    Equal costs give consecutive heads; otherwise the most expensive go first, each to the rank with the least so far
    (longest processing time first, Graham 1969).
    """
    if len(set(costs)) <= 1:
        return tuple(tuple(map(int, heads)) for heads in np.array_split(np.arange(len(costs)), world))
    ranks = [(0, 0, rank) for rank in range(world)]  # work, heads, rank
    dealt: list[list[int]] = [[] for _ in range(world)]
    for head in sorted(range(len(costs)), key=lambda head: -costs[head]):
        work, held, rank = heapq.heappop(ranks)
        dealt[rank].append(head)
        heapq.heappush(ranks, (work + costs[head], held + 1, rank))
    return tuple(tuple(sorted(heads)) for heads in dealt)


@dataclass(frozen=True)
class OfHeads(Policy):
    """The policy of some of the heads: the budget and prior of all of them, of which these are taken.

    Args:
        whole: the policy of all heads; total: how many there are; heads: the ones that are meant.
    """

    name: ClassVar[str] = "of_heads"
    whole: Policy
    total: int
    heads: Heads

    def budget(self, q: BlockedAxis, kv: BlockedAxis, heads: int) -> Budget | None:
        """The budget of all heads, cut to these."""
        budget = self.whole.budget(q, kv, self.total)
        if not isinstance(budget, Budget) or np.shape(budget.quotas)[:1] != (self.total,):
            return budget
        return replace(budget, quotas=budget.quotas[list(self.heads)])

    def prior(self, q: BlockedAxis, kv: BlockedAxis) -> np.ndarray | None:
        """The prior of all heads, cut to these."""
        prior = self.whole.prior(q, kv)
        if prior is None or np.ndim(prior) != 3 or np.shape(prior)[0] != self.total:
            return prior
        return np.asarray(prior)[list(self.heads)]

    def score(self, qb: str, kb: str, prior: str | None, *, score: str, scale: float) -> Op:
        """The score of all heads' policy."""
        return self.whole.score(qb, kb, prior, score=score, scale=scale)
