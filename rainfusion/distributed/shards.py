"""Shards: the tokens of a sequence in block order, spread over ranks in whole blocks, and put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rainfusion.core.checks import as_instance
from rainfusion.core.errors import LayoutError, ProblemError
from rainfusion.core.layout import TokenLayout
from rainfusion.distributed.agreement import agree
from rainfusion.distributed.ranks import DistributedError, Ranks


def shard(x: Tensor, layout: TokenLayout, *, group: Any = None, axis: int = 2) -> Tensor:
    """This rank's tokens of a whole tensor: in block order, in whole blocks, as many on every rank as that allows.

    Args:
        x: a tensor of the whole sequence, the same on all ranks.
        layout: where its tokens are; every rank has a multiple of both of its block sizes, the last one the rest.
        group: process group or one-dimensional DeviceMesh; default: all ranks.
        axis: the axis of its tokens: 2 for ``[batch, heads, tokens, head_dim]``, 1 for `bshd`.

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
        lengths = lengths_of_shards(ordered.shape[axis], layout.block, ranks.world)
        start = sum(lengths[: ranks.rank])
        mine: Tensor = ordered.narrow(axis, start, lengths[ranks.rank]).contiguous()
        return mine


def unshard(x: Tensor, layout: TokenLayout, *, group: Any = None, axis: int = 2) -> Tensor:
    """The whole tensor in the order of the sequence, on every rank: the inverse of `shard`.

    Args:
        x: this rank's tokens, as `attention` returned them.
        layout, group, axis: as for `shard`; a log-sum-exp ``[batch, heads, tokens]`` has its tokens on axis 2.

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
    except Exception as failure:
        error = failure
    lengths, _ = agree(ranks, record, (length, length), error=error)
    with torch.no_grad():
        whole = ranks.all_gather(x, [n for n, _ in lengths], axis)()
        unsharded: Tensor = layout.from_blocks(whole, axis=axis)
        return unsharded


def lengths_of_shards(length: int, block: tuple[int, int], world: int) -> tuple[int, ...]:
    """Tokens of every rank's shard.

    Raises:
        DistributedError: fewer blocks than ranks.
    """
    size = math.lcm(*block)
    blocks = -(-length // size)
    if blocks < world:
        raise DistributedError(
            f"{length} tokens are {blocks} blocks of {size}, too few for {world} ranks; use at most {blocks} ranks, or "
            "smaller blocks"
        )
    stops = [min((rank + 1) * blocks // world * size, length) for rank in range(world)]
    return tuple(stop - start for start, stop in zip([0, *stops], stops, strict=False))


def starts_of(lengths: Sequence[int]) -> list[int]:
    """The position of every shard's first token."""
    return [sum(lengths[:rank]) for rank in range(len(lengths))]


def check_whole_blocks(lengths: Sequence[int], block: int, name: str) -> None:
    """Refuse shards that end within a block.

    Raises:
        DistributedError: it says which, and how to make shards.
    """
    for rank, length in enumerate(lengths[:-1]):
        if length % block:
            raise DistributedError(
                f"{name} of rank {rank} has {length} tokens, which are not whole blocks of {block}; make shards with "
                "rainfusion.distributed.shard(x, layout)"
            )
