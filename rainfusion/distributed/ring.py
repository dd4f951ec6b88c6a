"""A ring: tensors of all ranks travel from each rank to the next one, as far as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rainfusion.distributed.ranks import Ranks

Wanted = np.ndarray  # bool [reader, owner, entries]


def around(
    ranks: Ranks, mine: Tensor, shapes: Sequence[tuple[int, ...]], axis: int, wanted: Wanted | None
) -> Iterator[tuple[int, Tensor | None]]:
    """The tensors of all ranks one after the other, as (rank, tensor), this rank's own first.

    The next one travels while the caller works on the one that it has, the first of them from now on.

    Args:
        mine: this rank's tensor.
        shapes: the shape of every rank's tensor.
        axis: of the entries that `wanted` is about.
        wanted: which entries every rank reads of every rank's tensor, bool ``[reader, owner, entries]``, the same on
            all ranks. What no rank further along the ring reads is not sent, and arrives as zeros; None arrives where
            this rank reads nothing. None for: all ranks read everything.
    """
    ring = _Ring(ranks, shapes, axis, wanted)
    held = _Held(ranks.rank, mine.contiguous(), None)
    return ring.arriving(held, ring.pass_on(held))


@dataclass(frozen=True)
class _Held:
    """A rank's tensor on its way: some entries of an axis, or all of them for None."""

    owner: int
    entries: Tensor
    which: np.ndarray | None


@dataclass(frozen=True)
class _Ring:
    """Tensors on their way around a ring of ranks."""

    ranks: Ranks
    shapes: Sequence[tuple[int, ...]]
    axis: int
    wanted: Wanted | None

    def arriving(self, held: _Held, wait: Callable[[], _Held] | None) -> Iterator[tuple[int, Tensor | None]]:
        yield held.owner, held.entries
        while wait is not None:
            held = wait()
            wait = self.pass_on(held)
            yield held.owner, self._whole(held)

    def pass_on(self, held: _Held) -> Callable[[], _Held] | None:
        """Start to send what this rank holds to the next one, and to receive; None where this rank has seen all."""
        rank, coming = self.ranks.rank, (held.owner - 1) % self.ranks.world
        if coming == rank:
            return None
        sent, which = self._for_others(held), self._read_from(coming, rank)
        shape = list(self.shapes[coming])
        if which is not None:
            shape[self.axis] = len(which)
        arriving = held.entries.new_empty(shape)
        operations = [
            dist.P2POp(operation, x, self.ranks.peer(to), self.ranks.group)
            for operation, x, to in ((dist.isend, sent, rank + 1), (dist.irecv, arriving, rank - 1))
            if x.numel()
        ]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> _Held:
            for work in works:
                work.wait()
            operations.clear()  # which kept the tensors while they travelled
            return _Held(coming, arriving, which)

        return wait

    def _read_from(self, owner: int, rank: int) -> np.ndarray | None:
        """Which entries of the owner's tensor are read on a rank, or further along the ring; None for all."""
        if self.wanted is None:
            return None
        world = self.ranks.world
        readers = [(owner + away) % world for away in range((rank - owner) % world, world)]
        read = self.wanted[readers, owner].any(axis=0)
        return None if read.all() else np.flatnonzero(read)

    def _for_others(self, held: _Held) -> Tensor:
        """What the next rank is sent of what this one holds."""
        which = self._read_from(held.owner, self.ranks.rank + 1)
        if which is None or (held.which is not None and len(which) == len(held.which)):
            return held.entries
        places = which if held.which is None else np.searchsorted(held.which, which)
        return held.entries.index_select(self.axis, torch.as_tensor(places, device=held.entries.device))

    def _whole(self, held: _Held) -> Tensor | None:
        """The tensor as this rank reads it; None where it reads nothing."""
        if self.wanted is not None and not self.wanted[self.ranks.rank, held.owner].any():
            return None
        if held.which is None:
            return held.entries
        whole = held.entries.new_zeros(self.shapes[held.owner])
        return whole.index_copy(self.axis, torch.as_tensor(held.which, device=whole.device), held.entries)
