"""The ranks of a process group, and the collectives that context parallelism is made of.

All of them take pieces of different sizes, and start before they wait: what is started travels while other work runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rainfusion.core.checks import shown
from rainfusion.core.errors import RainfusionError

Wait = Callable[[], Tensor]
Wanted = np.ndarray  # bool [reader, owner, entries]
# The name since torch 2.13, which warns of the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class DistributedError(RainfusionError, RuntimeError):
    """No process group, ranks that disagree, or shards that do not fit together."""


@dataclass(frozen=True)
class Ranks:
    """A process group as this process sees it.

    Attributes:
        rank: this process among them; world: how many there are.
    """

    group: Any
    rank: int
    world: int

    @classmethod
    def of(cls, group: Any = None) -> Ranks:
        """The ranks of a process group or a DeviceMesh of one or two dimensions; the default group for None.

        Raises:
            DistributedError: torch.distributed is not there or not initialised, or this process is not in the group.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise DistributedError(
                "torch.distributed is not initialised; start the program by torchrun and call "
                "torch.distributed.init_process_group first"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim == 2:
                return MeshRanks.of_mesh(group)
            if group.ndim != 1:
                raise DistributedError(
                    f"group is a DeviceMesh of {group.ndim} dimensions; give one of them, as mesh['ulysses'], or two, "
                    "as mesh['ring', 'ulysses']"
                )
            group = group.get_group()
        found = dist.group.WORLD if group is None else group
        if not isinstance(found, dist.ProcessGroup):
            raise DistributedError(
                f"group={shown(group)} is no process group of this process; give what torch.distributed.new_group "
                "makes for it, a DeviceMesh, or None for all ranks"
            )
        return cls(found, dist.get_rank(found), dist.get_world_size(found))

    # -- collectives -------------------------------------------------------------------------------

    def gather_objects(self, given: Any) -> list[Any]:
        """What every rank gave, in the order of ranks."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, given, group=self.group)
        return found

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], axis: int) -> Wait:
        """Send piece j to rank j, and receive one of ``shapes[i]`` from every rank i.

        Args:
            axis: the received pieces are joined along it.
        """
        sent = torch.cat([piece.reshape(-1) for piece in pieces])
        sizes = [_size(shape) for shape in shapes]
        received = sent.new_empty(sum(sizes))
        work = dist.all_to_all_single(
            received, sent, sizes, [piece.numel() for piece in pieces], group=self.group, async_op=True
        )

        def wait() -> Tensor:
            work.wait()
            parts = torch.split(received, sizes)
            return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim=axis)

        return wait

    def all_gather(self, x: Tensor, lengths: Sequence[int], axis: int) -> Wait:
        """The tensors of all ranks, joined along an axis of which rank i has ``lengths[i]``."""
        most = max(lengths)
        first = x.movedim(axis, 0)
        if x.shape[axis] < most:
            first = torch.cat([first, first.new_zeros(most - x.shape[axis], *first.shape[1:])])
        received = first.new_empty(self.world * most, *first.shape[1:])
        work = _all_gather(received, first.contiguous(), group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            parts = torch.split(received, most)
            whole = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
            return whole.movedim(0, axis)

        return wait

    def around(
        self, mine: Tensor, shapes: Sequence[tuple[int, ...]], axis: int = 0, wanted: Wanted | None = None
    ) -> Iterator[tuple[int, Tensor | None]]:
        """The tensors of all ranks one after the other, as (rank, tensor), this rank's own first.

        The next one travels around the ring of ranks while the caller works on the one that it has, the first of them
        from now on.

        Args:
            shapes: the shape of every rank's tensor.
            axis: of the entries that `wanted` is about.
            wanted: which entries every rank reads of every rank's tensor, bool ``[reader, owner, entries]``, the same
                on all ranks. What no rank further along the ring reads is not sent, and arrives as zeros; None arrives
                where this rank reads nothing. None for: all ranks read everything.
        """
        held = _Held(self.rank, mine.contiguous(), None)
        ring = _Ring(self, shapes, axis, wanted)
        return ring.arriving(held, ring.pass_on(held))

    def peer(self, rank: int) -> int:
        """The number that torch.distributed has for a rank of this group."""
        return int(dist.get_global_rank(self.group, rank % self.world))


@dataclass(frozen=True)
class MeshRanks(Ranks):
    """The ranks of a mesh of two dimensions, row by row: the ring goes through the rows, Ulysses within each."""

    ring: Ranks
    ulysses: Ranks

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh) -> MeshRanks:
        """The ranks of a mesh (ring, ulysses).

        Raises:
            DistributedError: dimensions of other names, or this process is not in it.
        """
        names = mesh.mesh_dim_names
        if names is not None and tuple(names) != ("ring", "ulysses"):
            raise DistributedError(
                f"group is a DeviceMesh of {' and '.join(names)}; give one of the two, or a mesh of ring and ulysses, "
                "in this order"
            )
        if mesh.get_coordinate() is None:
            raise DistributedError("this process is not in the DeviceMesh; call it on the ranks of the mesh alone")
        ring, ulysses = (Ranks.of(mesh.get_group(dimension)) for dimension in (0, 1))
        return cls(mesh, ring.rank * ulysses.world + ulysses.rank, ring.world * ulysses.world, ring, ulysses)

    def gather_objects(self, given: Any) -> list[Any]:
        """What every rank gave, in the order of ranks."""
        rows = self.ring.gather_objects(self.ulysses.gather_objects(given))
        return [found for row in rows for found in row]

    def all_gather(self, x: Tensor, lengths: Sequence[int], axis: int) -> Wait:
        """The tensors of all ranks, joined along an axis of which rank i has ``lengths[i]``."""
        width = self.ulysses.world
        rows = [lengths[i : i + width] for i in range(0, self.world, width)]
        row = self.ulysses.all_gather(x, rows[self.ring.rank], axis)()
        return self.ring.all_gather(row, [sum(row) for row in rows], axis)


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


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
