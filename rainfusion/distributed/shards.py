"""Shards: the tokens of a sequence in block order, spread over ranks in whole blocks, and put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rainfusion.core.checks import as_flag, as_instance
from rainfusion.core.errors import LayoutError, ProblemError
from rainfusion.core.layout import TokenLayout
from rainfusion.distributed.agreement import agree
from rainfusion.distributed.ranks import DistributedError, Ranks

Span = tuple[int, int]  # positions [start, stop) of a sequence


@dataclass(frozen=True)
class Shards:
    """Which tokens every rank has.

    Attributes:
        spans: for every rank, the ranges of the sequence that its shard is made of, ascending.
    """

    spans: tuple[tuple[Span, ...], ...]

    @classmethod
    def in_turn(cls, lengths: Sequence[int]) -> Shards:
        """The first rank has the first tokens, and so on."""
        return cls(tuple((span,) for span in _spans(lengths, 0)))

    @classmethod
    def even(cls, layout: TokenLayout, length: int, world: int, *, balanced: bool) -> Shards:
        """Whole blocks of a sequence in block order, equally many on every rank as far as that goes.

        Args:
            balanced: deal out the blocks whose rows a sink or text makes dense like the others, so that every rank has
                as many of them, rather than the last one all.

        Raises:
            DistributedError: fewer blocks than ranks.
        """
        size = math.lcm(*layout.block)
        blocks = -(-length // size)
        if blocks < world:
            raise DistributedError(
                f"{length} tokens are {blocks} blocks of {size}, too few for {world} ranks; use at most {blocks} "
                "ranks, or smaller blocks"
            )
        free = blocks
        if balanced:
            rows = layout.axis(length, 0)
            free = min(blocks, rows.free_blocks * rows.block // size)
        of_free = [free * (rank + 1) // world - free * rank // world for rank in range(world)]
        least, more = divmod(blocks - free, world)
        first = sorted(range(world), key=of_free.__getitem__)[:more]  # who has the fewest free blocks gets one more
        of_dense = [least + (rank in first) for rank in range(world)]
        spans = zip(_spans(of_free, 0), _spans(of_dense, free), strict=True)
        return cls(
            tuple(
                _merged([(start * size, min(stop * size, length)) for start, stop in two if stop > start])
                for two in spans
            )
        )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every rank."""
        return tuple(sum(stop - start for start, stop in spans) for spans in self.spans)

    def joined(self, ranks: int) -> Shards:
        """The shards of so many neighbouring ranks as one."""
        rows = [self.spans[i : i + ranks] for i in range(0, len(self.spans), ranks)]
        return Shards(tuple(_merged(sorted(span for spans in row for span in spans)) for row in rows))

    def part(self, first: int, ranks: int) -> Shards:
        """The shards of some neighbouring ranks, of the sequence that these have together."""
        return Shards(self.spans[first : first + ranks])

    def to_sequence(self, x: Tensor, axis: int, block: int = 1) -> Tensor:
        """The shards of all ranks, joined in the order of ranks, in the order of the sequence.

        Args:
            block: tokens that an entry of the axis stands for.
        """
        return self._arranged(x, axis, block, from_ranks=True)

    def to_ranks(self, x: Tensor, axis: int) -> Tensor:
        """The inverse of `to_sequence`."""
        return self._arranged(x, axis, 1, from_ranks=False)

    def _arranged(self, x: Tensor, axis: int, block: int, *, from_ranks: bool) -> Tensor:
        by_rank = [(rank, span) for rank, spans in enumerate(self.spans) for span in spans]
        in_sequence = sorted(by_rank, key=lambda entry: entry[1])
        if by_rank == in_sequence:
            return x
        given, wanted = (by_rank, in_sequence) if from_ranks else (in_sequence, by_rank)
        pieces = torch.split(x, [-(-(stop - start) // block) for _, (start, stop) in given], dim=axis)
        held = dict(zip(given, pieces, strict=True))
        return torch.cat([held[entry] for entry in wanted], dim=axis)

    def taken(self, x: Tensor, rank: int, axis: int, block: int = 1) -> Tensor:
        """A rank's part of a tensor of the whole sequence.

        Args:
            block: tokens that an entry of the axis stands for.
        """
        parts = [x.narrow(axis, start // block, -(-stop // block) - start // block) for start, stop in self.spans[rank]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def valid(self, lengths: Tensor, rank: int) -> Tensor:
        """How many of a rank's tokens are below the lengths of samples; they are the first of its shard."""
        counts = [(lengths - start).clamp(0, stop - start) for start, stop in self.spans[rank]]
        return sum(counts[1:], counts[0])


def _spans(lengths: Sequence[int], start: int) -> list[Span]:
    """Spans of these lengths, one after the other."""
    stops = [start + sum(lengths[: i + 1]) for i in range(len(lengths))]
    return list(zip([start, *stops], stops, strict=False))


def _merged(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans that follow each other as one."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def shard(x: Tensor, layout: TokenLayout, *, group: Any = None, axis: int = 2, balanced: bool = False) -> Tensor:
    """This rank's tokens of a whole tensor: in block order, in whole blocks, as many on every rank as that allows.

    Args:
        x: a tensor of the whole sequence, the same on all ranks.
        layout: where its tokens are; every rank has a multiple of both of its block sizes, the last one the rest.
        group: as for `attention`; default: all ranks.
        axis: the axis of its tokens: 2 for ``[batch, heads, tokens, head_dim]``, 1 for `bshd`.
        balanced: give every rank as many of the blocks whose rows a sink or text makes dense, rather than all of them
            to the last one. Say it to `attention` and `unshard`, too.

    Returns:
        The tokens for `attention(..., order="given")` on this rank.

    Raises:
        LayoutError: an axis of another length than the layout's.
        DistributedError: no process group, or fewer blocks than ranks.
    """
    ranks = Ranks.of(group)
    as_instance(layout, TokenLayout, "layout", LayoutError)
    with torch.no_grad():
        ordered = layout.to_blocks(x, axis=axis)
        shards = Shards.even(
            layout, ordered.shape[axis], ranks.world, balanced=as_flag(balanced, "balanced", ProblemError)
        )
        return shards.taken(ordered, ranks.rank, axis).contiguous()


def unshard(x: Tensor, layout: TokenLayout, *, group: Any = None, axis: int = 2, balanced: bool = False) -> Tensor:
    """The whole tensor in the order of the sequence, on every rank: the inverse of `shard`.

    Args:
        x: this rank's tokens, as `attention` returned them.
        layout, group, axis, balanced: as for `shard`; a log-sum-exp, ``[batch, heads, tokens]``, has its tokens on
            axis 2.

    Raises:
        LayoutError: tokens that together are not those of the layout.
        DistributedError: no process group, or ranks that disagree.
    """
    ranks = Ranks.of(group)
    record: dict[str, str] = {}
    length, error = 0, None
    try:
        as_instance(layout, TokenLayout, "layout", LayoutError)
        as_instance(x, Tensor, "x", ProblemError)
        length = x.shape[axis]
        others = [n for i, n in enumerate(x.shape) if i != axis % x.ndim]
        record = {"call": "unshard", "x": f"{x.dtype} {others} without axis {axis}", "layout": repr(layout)}
        record["balanced"] = repr(as_flag(balanced, "balanced", ProblemError))
    except Exception as failure:
        error = failure
    found, _ = agree(ranks, record, (length, length), error=error)
    shards = shards_of([n for n, _ in found], layout, balanced=balanced)
    with torch.no_grad():
        whole = shards.to_sequence(ranks.all_gather(x, shards.lengths, axis)(), axis)
        unsharded: Tensor = layout.from_blocks(whole, axis=axis)
        return unsharded


def shards_of(lengths: Sequence[int], layout: TokenLayout, *, balanced: bool) -> Shards:
    """The shards that have these lengths.

    Raises:
        DistributedError: balanced shards have other lengths.
    """
    if not balanced:
        return Shards.in_turn(lengths)
    shards = Shards.even(layout, sum(lengths), len(lengths), balanced=True)
    if shards.lengths != tuple(lengths):
        raise DistributedError(
            f"balanced shards have {', '.join(map(str, shards.lengths))} tokens, not {', '.join(map(str, lengths))}; "
            "make them with rainfusion.distributed.shard(x, layout, balanced=True)"
        )
    return shards


def check_whole_blocks(shards: Shards, block: int, name: str) -> None:
    """Refuse shards that end within a block.

    Raises:
        DistributedError: it says which, and how to make shards.
    """
    end = sum(shards.lengths)
    for rank, spans in enumerate(shards.spans):
        if any(stop % block for _, stop in spans if stop != end):
            raise DistributedError(
                f"{name} of rank {rank} has {shards.lengths[rank]} tokens, which are not whole blocks of {block}; make "
                "shards with rainfusion.distributed.shard(x, layout)"
            )
