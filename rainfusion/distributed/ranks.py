"""The ranks of a process group, and the collectives that context parallelism is made of.

All of them take pieces of different sizes, and start before they wait: what is started travels while other work runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
        rank: this process among them; world: how many there are.
    """

    group: Any
    rank: int
    world: int

    @classmethod
    def of(cls, group: Any = None) -> Ranks:
        """The ranks of a process group or of a one-dimensional DeviceMesh; the default group for None.

        Raises:
            DistributedError: torch.distributed is not there or not initialised, or this process is not in the group.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise DistributedError(
                "torch.distributed is not initialised; start the program by torchrun and call "
                "torch.distributed.init_process_group first"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise DistributedError(
                    f"group is a DeviceMesh of {group.ndim} dimensions; give one of them, as mesh['ulysses']"
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

    def around(self, mine: Tensor, shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, Tensor]]:
        """The tensors of all ranks one after the other, as (rank, tensor), this rank's own first.

        The next one travels around the ring of ranks while the caller works on the one that it has, the first of them
        from now on.

        Args:
            shapes: the shape of every rank's tensor.
        """
        held = mine.contiguous()
        return self._arriving(held, self._pass_on(held, self.rank, shapes), shapes)

    def _arriving(
        self, held: Tensor, wait: Wait | None, shapes: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[int, Tensor]]:
        owner = self.rank
        yield owner, held
        while wait is not None:
            held, owner = wait(), (owner - 1) % self.world
            wait = self._pass_on(held, owner, shapes)
            yield owner, held

    def _pass_on(self, held: Tensor, owner: int, shapes: Sequence[tuple[int, ...]]) -> Wait | None:
        """Start to send what this rank holds to the next one, and to receive; None where this rank has seen all."""
        coming = (owner - 1) % self.world
        if coming == self.rank:
            return None
        arriving = held.new_empty(shapes[coming])
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, held, self._peer(self.rank + 1), self.group),
                dist.P2POp(dist.irecv, arriving, self._peer(self.rank - 1), self.group),
            ]
        )

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return arriving

        return wait

    def _peer(self, rank: int) -> int:
        return int(dist.get_global_rank(self.group, rank % self.world))


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
