"""A call that is to be sparse: its tensors, what planning says of it, and what can be attended and selected for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rainfusion
from rainfusion.core.arrays import array_facts
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask import BlockMask
from rainfusion.integrations.clock import Moment
from rainfusion.integrations.config import Share
from rainfusion.integrations.reuse import taken

Array = Any


@dataclass(frozen=True)
class Assessment:
    """What planning says of a call.

    Attributes:
        why_dense: why it stays dense; empty where it is to be sparse.
        density: share of block pairs attended.
        layout: of the sequence.
        budget: the argument of `rainfusion.attention` that asks for it. Shares a head become quotas on the device of
            the call, so that layers with different shares have one plan.
        is_reached: whether as much is skipped as was asked for.
    """

    why_dense: str
    density: float | None
    layout: TokenLayout
    budget: Mapping[str, Any]
    is_reached: bool = True


@dataclass(frozen=True)
class Call:
    """A call that the schedule makes sparse.

    Attributes:
        place: (context, layer, how often the layer was called in this forward); masks are kept by it. The context is
            empty where contexts share masks.
        moment: when it takes place.
        q, k, v: ``[batch, tokens, heads, head_dim]``.
        share: of block pairs to skip, as the schedule has it.
        settings: what `rainfusion.attention` is told beside its tensors and its budget.
        dense: the host's own attention.
        assess: what planning says of another share to skip.
    """

    place: tuple[str, int, int]
    moment: Moment
    q: Array
    k: Array
    v: Array
    share: Share
    settings: Mapping[str, Any]
    dense: Callable[[], Array]
    assess: Callable[[Share], Assessment]

    @property
    def layer(self) -> int:
        """The layer that calls."""
        return self.place[1]

    @property
    def heads(self) -> int:
        """Of the queries."""
        return int(self.q.shape[2])

    @property
    def layout(self) -> TokenLayout:
        """Of the sequence; its tokens are in block order where `order` is ``"given"``."""
        return self.assess(self.share).layout

    @property
    def order(self) -> str:
        """As in `rainfusion.attention`."""
        return str(self.settings["order"])

    @property
    def kv_lengths(self) -> Array:
        """As in `rainfusion.attention`."""
        return self.settings["kv_lengths"]

    @property
    def fit(self) -> tuple[Any, ...]:
        """What a mask has to be made for, to be of use in this call."""
        facts = map(array_facts, (self.q, self.k))
        return (self.place, self.settings["parts"], self.share, self.order, *facts)

    def is_reached(self, share: Share) -> bool:
        """Whether as much as this share can be skipped."""
        return self.assess(self._by_head(share)).is_reached

    def sparse(self, share: Share) -> Array:
        """Sparse attention with these shares to skip; one for all is one a head, so that all shares have one plan."""
        budget = self.assess(self._by_head(share)).budget
        return rainfusion.attention(self.q, self.k, self.v, **budget, **self.settings)

    def masked(self, mask: BlockMask) -> Array:
        """Sparse attention with a mask."""
        return rainfusion.attention(self.q, self.k, self.v, mask=mask, **self.settings)

    def select(self, heads: Sequence[int]) -> BlockMask:
        """The mask of some heads, or of all."""
        group = self.heads // self.k.shape[2]
        budget = dict(self.assess(self.share).budget)
        if "quotas" in budget:
            budget["quotas"] = taken(budget["quotas"], heads, 0)
        elif isinstance(self.share, tuple):
            budget["sparsity"] = tuple(self.share[head] for head in heads)
        q, k = taken(self.q, heads, 2), taken(self.k, [head // group for head in heads], 2)
        return rainfusion.select(q, k, **budget, **self.settings)

    def _by_head(self, share: Share) -> Share:
        return share if isinstance(share, tuple) else (share,) * self.heads


Probe = Callable[[Call], Array]
"""Gives the result of a call in the engine's place."""
