"""Masks used again: which heads keep the mask of an earlier step, and which are selected anew.

A head's mask is used until it is `refresh_every` steps old or, where `reuse_drift` is set, until the head has drifted
further than that since the mask was made. Heads refresh on their own.

The host never waits for a drift. The decision at a step uses the newest drift that has arrived: on a CPU that of the
step itself, on a CUDA device usually that of the step before. Until one has arrived, age alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from rainfusion.core.arrays import namespace
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask import BlockMask, PackedMask
from rainfusion.integrations.clock import Moment
from rainfusion.integrations.config import RainFusionConfig
from rainfusion.integrations.device_reads import Arrival, arriving
from rainfusion.integrations.drift import Means, Sampler, drift

Array = Any
ReadMeans = Callable[[], Means]


class Origin(NamedTuple):
    """When a head's mask was made.

    Attributes:
        call: how many calls its place had seen.
    """

    step: int
    context: str
    call: int


class Measured(NamedTuple):
    """The drifts of all heads at a call."""

    context: str
    call: int
    read: Arrival


class Readings:
    """Drifts that were measured at one place and may still be on their way to the host."""

    def __init__(self) -> None:
        self._measured: list[Measured] = []

    def add(self, measured: Measured) -> None:
        """Await drifts."""
        self._measured.append(measured)

    def newest(self, context: str) -> tuple[int, list[float]]:
        """The call and the drifts of the newest that have arrived for a context; -1 and none where none have."""
        for measured in reversed(self._measured):
            if measured.context == context and (values := measured.read()) is not None:
                self._measured = [one for one in self._measured if one.context != context or one.call >= measured.call]
                return measured.call, values
        return -1, []

    def forget(self, call: int) -> None:
        """Let go of what was measured up to a call: every mask is newer."""
        self._measured = [measured for measured in self._measured if measured.call > call]


class Masks:
    """The masks of a run, by the place of the call that they belong to."""

    def __init__(self, config: RainFusionConfig) -> None:
        self._config, self._sampler = config, Sampler()
        self._places: dict[Any, HeadMasks] = {}

    def __len__(self) -> int:
        return len(self._places)

    def clear(self) -> None:
        """The run is over."""
        self._places.clear()

    def at(self, place: Any, heads: int) -> HeadMasks:
        """The masks of a place, of which there may be none yet."""
        if place not in self._places:
            self._places[place] = HeadMasks(heads, self._config.refresh_every, self._config.reuse_drift)
        return self._places[place]

    def means(self, q: Array, k: Array, layout: TokenLayout, order: str) -> ReadMeans | None:
        """A function that takes the means of a call once it is asked; None where drift does not matter.

        Args as for `Sampler.means`.
        """
        return None if self._config.reuse_drift is None else cache(lambda: self._sampler.means(q, k, layout, order))


class HeadMasks:
    """The masks of the heads of one place: each from the call at which it was made.

    Args:
        every: steps that a mask is used for.
        limit: the most drift at which a mask is used again; None for no limit.
    """

    def __init__(self, heads: int, every: int, limit: float | None) -> None:
        self._every, self._limit = every, math.inf if limit is None else limit
        self._call = 0
        self._origins: list[Origin | None] = [None] * heads
        self._mask: PackedMask | None = None
        self._reference: Means | None = None
        self._readings = Readings()

    def stale(self, moment: Moment, means: ReadMeans | None) -> tuple[int, ...]:
        """The heads to select anew at a call, ascending.

        Their number is 1, 2, 4, 8, ... or all: backends compile for few shapes then. The heads that have drifted most
        fill it up.

        Args:
            means: those of the call.
        """
        self._call += 1
        heads = range(len(self._origins))
        over = {head for head in heads if self._is_over(self._origins[head], moment)}
        if means is None or len(over) == len(heads):
            return tuple(sorted(over))
        drifts = self._drifts(moment.context, means)
        stale = over | {head for head in heads if not drifts[head] <= self._limit}  # NaN has drifted
        others = sorted(set(heads) - stale, key=lambda head: -drifts[head])
        more = rounded(len(stale), len(heads)) - len(stale)
        return tuple(sorted([*stale, *others[:more]]))

    def _is_over(self, origin: Origin | None, moment: Moment) -> bool:
        if origin is None or moment.step - origin.step >= self._every:
            return True
        # A step that begins again, or another forward of it, which the host did not tell apart.
        return moment.step == origin.step and moment.context == origin.context

    def _drifts(self, context: str, means: ReadMeans) -> list[float]:
        """The newest drift that has arrived for every head since its mask was made; 0 where there is none.

        A mask that contexts share is watched in the context that made it: the others differ by their prompt.
        """
        if self._reference is None or not any(self._is_of(context, head) for head in range(len(self._origins))):
            return [0.0] * len(self._origins)
        self._readings.add(Measured(context, self._call, arriving(drift(means(), self._reference))))
        call, values = self._readings.newest(context)
        return [values[h] if self._is_of(context, h, before=call) else 0.0 for h in range(len(self._origins))]

    def _is_of(self, context: str, head: int, before: float = math.inf) -> bool:
        """Whether a head's mask was made in a context, before a call."""
        origin = self._origins[head]
        return origin is not None and origin.context == context and origin.call < before

    # -- the masks -----------------------------------------------------------------------------------

    @property
    def mask(self) -> BlockMask:
        """The mask of all heads, on its device."""
        assert self._mask is not None
        return self._mask.unpacked()

    def put(self, heads: Sequence[int], mask: BlockMask, moment: Moment, means: ReadMeans | None) -> None:
        """Keep the new masks of some heads, or of all.

        Args:
            heads: ascending, those of `mask`.
            means: those of the call.
        """
        packed, new = mask.packed(), None if means is None else means()
        if self._mask is not None and len(heads) < len(self._origins):
            packed = replace(self._mask, bits=replaced(self._mask.bits, packed.bits, heads, axis=1))
            if new is not None and self._reference is not None:
                old = self._reference
                new = Means(*(replaced(o, n, heads, 2, whole=True) for o, n in zip(old, new, strict=True)))
        self._mask, self._reference = packed, new
        for head in heads:
            self._origins[head] = Origin(moment.step, moment.context, self._call)
        self._readings.forget(min(origin.call for origin in self._origins if origin is not None))


def rounded(number: int, most: int) -> int:
    """The next power of two, 0 for 0; `most` where that is reached."""
    return min(1 << (number - 1).bit_length(), most) if number else 0


def taken(x: Array, places: Iterable[int], axis: int) -> Array:
    """The entries of an axis in a given order, by slices: a list of indices would be copied to the device."""
    parts = [_sliced(x, start, stop, axis) for start, stop in _runs(places)]
    return parts[0] if len(parts) == 1 else namespace(x).concat(parts, axis=axis)


def replaced(old: Array, new: Array, places: Sequence[int], axis: int, *, whole: bool = False) -> Array:
    """`old` with some entries of an axis taken from `new`, by slices.

    Args:
        places: of the entries, ascending.
        whole: `new` has all entries, not these alone.
    """
    parts, done = [], 0
    at = 0
    for start, stop in _runs(places):
        if start > done:
            parts.append(_sliced(old, done, start, axis))
        first = start if whole else at
        parts.append(_sliced(new, first, first + stop - start, axis))
        at, done = at + stop - start, stop
    if done < old.shape[axis]:
        parts.append(_sliced(old, done, old.shape[axis], axis))
    return namespace(old).concat(parts, axis=axis)


def _runs(places: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The places as ranges [start, stop)."""
    start = stop = -1
    for place in places:
        if place != stop:
            if stop > start:
                yield start, stop
            start = place
        stop = place + 1
    if stop > start:
        yield start, stop


def _sliced(x: Array, start: int, stop: int, axis: int) -> Array:
    return x[(slice(None),) * axis + (slice(start, stop),)]
