"""The ranks of a process group, and the collectives that context parallelism is made of.

All of them take pieces of different sizes, and start before they wait: what is started travels while other work runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rainfusion.core.checks import shown
from rainfusion.core.errors import RainfusionError

Wait = Callable[[], Tensor]
# The name since torch 2.13, which warns of the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class DistributedError(RainfusionError, RuntimeError):
    """No process group, ranks that disagree, or shards that do not fit together."""


@dataclass(frozen=True)
class Ranks:
    """A process group as this process sees it.

    Attributes:
        held: the process group, which is not kept alive: what is remembered for it ends with it.
        rank: this process among them; world: how many there are.
    """

    held: ref[Any]
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
        return cls(ref(found), dist.get_rank(found), dist.get_world_size(found))

    @property
    def group(self) -> Any:
        """The process group.

        Raises:
            DistributedError: it was destroyed.
        """
        found = self.held()
        if found is None:
            raise DistributedError("the process group was destroyed; give one that torch.distributed has")
        return found

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

    def peer(self, rank: int) -> int:
        """The number that torch.distributed has for a rank of this group."""
        return int(dist.get_global_rank(self.group, rank % self.world))


@dataclass(frozen=True)
class MeshRanks(Ranks):
    """The ranks of a mesh of two dimensions, row by row: the ring goes through the rows, Ulysses within each.

    `group` is that of the ring; a mesh would not do, since one that is made later may be equal to it.
    """

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
        return cls(ring.held, ring.rank * ulysses.world + ulysses.rank, ring.world * ulysses.world, ring, ulysses)

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


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
