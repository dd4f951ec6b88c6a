"""Ulysses: every rank gives away heads and gets tokens, attends to the whole sequence, and gives the tokens back.

As DeepSpeed-Ulysses (arXiv 2309.14509); that heads are dealt out by what they keep is as in xDiT and db-SP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rainfusion.core.mask import BlockMask
from rainfusion.core.plan import Plan
from rainfusion.core.policies import Fixed
from rainfusion.distributed.by_tokens import ByTokens
from rainfusion.distributed.call import Call, run
from rainfusion.distributed.heads import Heads, OfHeads, deal
from rainfusion.distributed.ranks import DistributedError, MeshRanks, Wait
from rainfusion.distributed.shards import Shards


class Alone:
    """Attention to the whole sequence on one device."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.plans = call.plan(call.shard, call.policy, call.returns)[:1]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> list[Any]:
        """The values that the call returns."""
        return [*run(self._call.executable(self.plans[0], q), {"q": q, "k": k, "v": v, **operands})]


class Ulysses:
    """Attention whose heads are spread over the ranks while it runs.

    With a `MeshRanks`, heads are spread over the ranks of a row of the mesh, and the rows are a ring.

    Raises:
        ProblemError, DistributedError: fewer heads than ranks; with a ring, as `ByTokens`.
    """

    def __init__(self, call: Call) -> None:
        ranks = call.ranks
        self._ranks = ranks.ulysses if isinstance(ranks, MeshRanks) else ranks
        world, rank = self._ranks.world, self._ranks.rank
        first = ranks.rank - rank
        self._q, self._kv = (shards.part(first, world) for shards in (call.q_shards, call.kv_shards))
        problem = replace(call.problem, q_len=sum(self._q.lengths), kv_len=sum(self._kv.lengths))
        if problem.heads < world:
            raise DistributedError(
                f"{problem.heads} heads cannot be spread over {world} ranks; use at most {problem.heads} ranks, or "
                "method='gather' or 'ring', which spread tokens"
            )
        self.call = call
        # Key heads travel with the query heads that read them; where they are too few, every query head has a copy.
        self._copies = problem.group if problem.kv_heads < world else 1
        kv_heads = problem.kv_heads * self._copies
        group = problem.heads // kv_heads
        self._kv_heads = deal(self._costs(kv_heads), world)
        self._heads = tuple(tuple(h * group + i for h in heads for i in range(group)) for heads in self._kv_heads)
        mine = self._heads[rank]
        policy = Fixed() if "mask" in call.given else OfHeads(call.policy, problem.heads, mine)
        shard = replace(problem, heads=len(mine), kv_heads=len(self._kv_heads[rank]))
        local = replace(call, shard=shard, policy=policy)
        self._attend: Alone | ByTokens
        if isinstance(ranks, MeshRanks):
            q_rows, kv_rows = (shards.joined(world) for shards in (call.q_shards, call.kv_shards))
            local = replace(local, ranks=ranks.ring, q_shards=q_rows, kv_shards=kv_rows)
            self._attend = ByTokens(local, ring=True)
        else:
            self._attend = Alone(local)

    def _costs(self, kv_heads: int) -> list[int]:
        """Blocks that every key head's query heads keep, where planning knows them; otherwise all cost the same."""
        counts = None if self.call.given & {"mask", "quotas"} else self.call.whole[0].row_counts
        if counts is None or len(counts) != self.call.problem.heads:
            return [1] * kv_heads
        return [int(cost) for cost in counts.reshape(kv_heads, -1).sum(axis=1)]

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What this rank runs."""
        return self._attend.plans

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> list[Any]:
        """The values that the call returns, of this rank's tokens; the mask is that of all heads."""
        call = self.call
        if self._copies > 1:
            k, v = (x.repeat_interleave(self._copies, dim=call.head_axis) for x in (k, v))
        started = [
            self._to_heads(x, heads, shards)
            for x, heads, shards in (
                (q, self._heads, self._q),
                (k, self._kv_heads, self._kv),
                (v, self._kv_heads, self._kv),
            )
        ]
        q, k, v = (wait() for wait in started)
        values = self._attend(q, k, v, self._of_my_heads(operands))
        named = dict(zip(call.returns, values, strict=True))
        waits = {"%out": self._to_tokens(named["%out"], call.head_axis, call.token_axis)}
        if "%lse" in named:
            waits["%lse"] = self._to_tokens(named["%lse"], 1, 2)
        found: dict[str, Any] = {name: wait() for name, wait in waits.items()}
        if "%mask" in named:
            found["%mask"] = self._of_all_heads(named["%mask"])
        return [found[name] for name in call.returns]

    def _to_heads(self, x: Tensor, heads: Sequence[Heads], shards: Shards) -> Wait:
        """Start to exchange this rank's tokens of all heads for all tokens of its heads."""
        head_axis, token_axis, mine = self.call.head_axis, self.call.token_axis, len(heads[self._ranks.rank])
        pieces = [_taken(x, theirs, head_axis) for theirs in heads]
        shapes = [_resized(x, {head_axis: mine, token_axis: length}) for length in shards.lengths]
        arrived = self._ranks.all_to_all(pieces, shapes, token_axis)
        return lambda: shards.to_sequence(arrived(), token_axis)

    def _to_tokens(self, x: Tensor, head_axis: int, token_axis: int) -> Wait:
        """Start the way back."""
        lengths = self._q.lengths
        pieces = torch.split(self._q.to_ranks(x, token_axis), list(lengths), dim=token_axis)
        mine = lengths[self._ranks.rank]
        shapes = [_resized(x, {head_axis: len(heads), token_axis: mine}) for heads in self._heads]
        arrived = self._ranks.all_to_all(pieces, shapes, head_axis)
        return lambda: self._in_order(arrived(), head_axis)

    def _in_order(self, x: Tensor, axis: int) -> Tensor:
        """Heads as the caller numbers them."""
        dealt = [head for heads in self._heads for head in heads]
        return x if dealt == sorted(dealt) else _taken(x, sorted(range(len(dealt)), key=dealt.__getitem__), axis)

    def _of_my_heads(self, operands: Mapping[str, Any]) -> dict[str, Any]:
        """The operands that are given at call time, of this rank's heads."""
        mine, cut = self._heads[self._ranks.rank], dict(operands)
        mask, quotas = operands["mask"], operands["quotas"]
        if mask is not None:
            blocks = _taken(mask.blocks, mine, 1).contiguous()
            cut["mask"] = BlockMask(blocks, mask.q_len, mask.kv_len, mask.block, mask.layout)
        if quotas is not None and quotas.ndim == 2 and quotas.shape[0] == self.call.problem.heads > 1:
            cut["quotas"] = quotas[list(mine)]
        return cut

    def _of_all_heads(self, mask: BlockMask) -> BlockMask:
        call = self.call
        counts = [len(heads) for heads in self._heads]
        blocks = self._ranks.all_gather(mask.blocks.to(torch.uint8), counts, 1)()
        return BlockMask(
            self._in_order(blocks, 1).to(torch.bool), mask.q_len, mask.kv_len, mask.block, call.settings.layout()
        )


def _taken(x: Tensor, indices: Sequence[int], axis: int) -> Tensor:
    """The named places of an axis; a view where they follow each other."""
    if list(indices) == list(range(indices[0], indices[0] + len(indices))):
        return x.narrow(axis, indices[0], len(indices))
    return x.index_select(axis, torch.tensor(list(indices), device=x.device))


def _resized(x: Tensor, sizes: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(sizes.get(axis, size) for axis, size in enumerate(x.shape))
