"""Streams: the tensors of one sequence that diffusers' context parallelism splits each by itself.

Every device has a part of the text and a part of the images, so that after heads are exchanged for tokens, the parts
of all devices stand one after the other. What was split is put together again before attention, and split after it.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rainfusion.core.errors import ProblemError
from rainfusion.core.layout import Grid, Text
from rainfusion.integrations.engine import Parts, Rest

if TYPE_CHECKING:
    from rainfusion.distributed.shards import Shards

Streams = tuple[int | None, ...]
"""Tokens of every stream in the order of attention; None for those that the others leave."""


class Split(NamedTuple):
    """What one of several devices has: heads from `first` on of `total`, and `tokens` of what `ranks` devices have."""

    first: int
    total: int
    ranks: int
    rank: int
    tokens: int


def streams_of(parts: Parts, split: str) -> Streams | None:
    """The streams of a sequence; None where it is not known how it is split.

    Args:
        split: as in `Adapter`.
    """
    if split == "whole" or [type(part) for part in parts] == [Grid]:
        return (None,)
    runs = [(is_text, [*run]) for is_text, run in groupby(parts, lambda part: isinstance(part, Text | Rest))]
    if split != "text_apart" or len(runs) != 2:
        return None
    return tuple(_count(run) for _, run in runs)


def _count(run: list[Any]) -> int | None:
    return None if any(isinstance(part, Rest) for part in run) else sum(part.count for part in run)


@lru_cache(maxsize=64)
def shards_of(streams: Streams, length: int, split: Split) -> Shards:
    """Which tokens of a sequence every device has.

    Raises:
        ProblemError: this device has another number of tokens.
    """
    from rainfusion.distributed.shards import Shards

    known = sum(count for count in streams if count is not None)
    spans: list[list[tuple[int, int]]] = [[] for _ in range(split.ranks)]
    start = 0
    for stream in streams:
        count = length - known if stream is None else stream
        for rank, places in enumerate(np.array_split(np.arange(start, start + count), split.ranks)):
            if len(places):
                spans[rank].append((int(places[0]), int(places[-1]) + 1))
        start += count
    shards = Shards(tuple(map(tuple, spans)))
    if start != length or shards.lengths[split.rank] != split.tokens:
        raise ProblemError(
            f"device {split.rank} of {split.ranks} has {split.tokens} of {length} tokens, and rainfusion expects "
            f"{shards.lengths[split.rank]}: text and images each split evenly. Use the context parallel plan that "
            "diffusers has for this model, or call remove() of the handle for dense attention"
        )
    return shards
