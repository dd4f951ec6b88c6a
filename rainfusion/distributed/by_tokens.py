"""Gather and ring: every rank keeps its query tokens and attends to the keys of all, as a whole or piece by piece.

Blocks are selected from the block means of all ranks (under 1 % of the keys), by the very program that one device
runs, so that the mask is that of one device bit for bit. Every rank takes its rows of it. Pieces are joined by
log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import rainfusion
from rainfusion.core import passes
from rainfusion.core.errors import ProblemError
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import Attend, AttendMeans
from rainfusion.core.plan import Plan
from rainfusion.core.policies import Fixed
from rainfusion.distributed.call import Call, run
from rainfusion.distributed.ranks import Wait
from rainfusion.distributed.ring import Wanted, around
from rainfusion.distributed.shards import Shards, check_whole_blocks

_Piece = tuple[int | None, Tensor]  # the rank whose shard it is, None for all; keys and values ``[2, ...]``


class ByTokens:
    """Attention whose query tokens stay where they are.

    Raises:
        ProblemError: tokens that are not in block order.
        DistributedError: shards that are not whole blocks.
    """

    def __init__(self, call: Call, *, ring: bool) -> None:
        self.call, self._ring = call, ring
        self._block = call.settings.layout().block
        whole = call.whole[0]
        if call.settings.order != "given" and (whole.q_axis.ordered or whole.kv_axis.ordered):
            raise ProblemError(
                f"method={'ring' if ring else 'gather'!r} takes tokens in block order; shard the sequence with "
                "rainfusion.distributed.shard(x, layout) and say order='given', or use method='ulysses'"
            )
        self._q, self._kv, self._rank = call.q_shards, call.kv_shards, call.ranks.rank
        check_whole_blocks(self._q, self._block[0], "q")
        check_whole_blocks(self._kv, self._block[1], "k")
        self._is_dense = whole.is_dense
        self._summarises = whole.summarises
        self._pads_queries = "kv_lengths" in call.given and call.problem.q_len == call.problem.kv_len

    # -- what is planned -----------------------------------------------------------------------------

    @cached_property
    def _selection(self) -> Plan | None:
        """The mask of the whole sequence from its block means; None where it is given, or keeps everything."""
        if self._is_dense or "mask" in self.call.given:
            return None
        plan = self.call.plan(self.call.problem, self.call.policy, ("%mask",), omitted="drop", order="given")[0]
        return passes.from_means(plan)

    @cached_property
    def _attentions(self) -> dict[int, Plan]:
        """By the key tokens of a piece: attention over it."""
        pieces = self._kv.lengths if self._ring else (self.call.problem.kv_len,)
        return {kv_len: self._attention(kv_len) for kv_len in sorted({*pieces})}

    def _attention(self, kv_len: int) -> Plan:
        """Attention of this rank's queries over a piece of the keys, by a mask and means that are given."""
        problem = replace(self.call.shard, kv_len=kv_len)
        plan = passes.dense(problem, TokenLayout(block=self._block))
        if not self._is_dense:
            plan = passes.given_mask(plan)
        if self._summarises:
            plan = passes.summarise_omitted(plan)
        plan = passes.returning(plan, ("%out", "%lse"))
        if "kv_lengths" in self.call.given:
            plan = _without_query_lengths(passes.limit_lengths(plan))
        settings = self.call.settings
        if settings.precision is not None:
            plan = passes.quantised(plan, settings.precision, rotated=settings.rotate)
        return passes.from_means(plan)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What this rank runs, beside the block means."""
        attentions = self._attentions.values()
        return tuple(attentions) if self._selection is None else (self._selection, *attentions)

    # -- a call --------------------------------------------------------------------------------------

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> list[Any]:
        """The values that the call returns, of this rank's tokens; the mask is that of the whole sequence."""
        call = self.call
        lengths, keys_and_values = self._lengths(operands["kv_lengths"], q), torch.stack([k, v])
        waits = self._means(q, k, v, lengths)  # first, for on GPUs transfers are made one after the other
        gathered = None if self._ring else call.ranks.all_gather(keys_and_values, self._kv.lengths, self._axis)
        means = {name: wait() for name, wait in waits.items()}
        mask = self._mask(q, means, {**operands, "kv_lengths": lengths})
        rows = None if mask is None else self._q.taken(mask.blocks, self._rank, 2, self._block[0])
        pieces = self._around(keys_and_values, rows) if gathered is None else self._at_once(gathered)
        if self._pads_queries and call.settings.precision is not None:
            q = self._without_padding(q, lengths)  # which would take part in the scales of its blocks
        out = lse = None
        for owner, (keys, values) in pieces:
            arguments = {"q": q, "k": keys, "v": values, **self._columns(rows, means, lengths, owner)}
            part, part_lse = run(call.executable(self._attentions[keys.shape[call.token_axis]], q), arguments)
            if out is None:
                out, lse = part.to(part_lse.dtype), part_lse
            else:
                assert lse is not None
                out, lse = self._merged(out, lse, part, part_lse)
        assert out is not None
        assert lse is not None
        if self._pads_queries:
            out, lse = self._without_padding(out, lengths), lse.masked_fill(self._padding(lengths), float("-inf"))
        found = {"%out": out.to(q.dtype), "%lse": lse, "%mask": mask}
        return [found[name] for name in call.returns]

    def _merged(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
        """As `rainfusion.merge`, but into `out`: every copy of it is a pass over memory that nothing hides."""
        share = torch.sigmoid(part_lse - lse).nan_to_num(0.0)  # NaN where a row has kept nothing in either of them
        over_heads = share if self.call.head_axis == 1 else share.transpose(1, 2)
        return out.lerp_(part.to(out.dtype), over_heads[..., None]), torch.logaddexp(lse, part_lse)

    @property
    def _axis(self) -> int:
        """The axis of tokens in keys and values together."""
        return self.call.token_axis + 1

    def _at_once(self, gathered: Wait) -> Iterator[_Piece]:
        yield None, self._kv.to_sequence(gathered(), self._axis)

    def _around(self, keys_and_values: Tensor, rows: Tensor | None) -> Iterator[_Piece]:
        """Start to pass shards of keys and values around, and give them as they come."""
        call, axis, shape = self.call, self._axis, keys_and_values.shape
        shapes = [(*shape[:axis], length, *shape[axis + 1 :]) for length in self._kv.lengths]
        wanted = None if rows is None or self._is_dense else self._wanted(rows)
        for owner, piece in around(call.ranks, keys_and_values, shapes, call.head_axis + 1, wanted):
            if piece is not None:
                yield owner, piece
            elif self._summarises:  # the means of the shard count, though none of its blocks does
                yield owner, keys_and_values.new_zeros(shapes[owner])

    def _wanted(self, rows: Tensor) -> Wanted:
        """Which key heads of every shard any row of a rank reads, bool ``[rank, shard, key head]``.

        Ranks exchange it, so that they agree on what travels even where they were given different masks. The host waits
        for the mask: it has to know what to send.
        """
        ranks, shard = self.call.ranks, self.call.shard
        of_shards = [
            self._kv.taken(rows, owner, 3, self._block[1]).any(dim=3).any(dim=2).any(dim=0)
            for owner in range(ranks.world)
        ]
        mine = torch.stack(of_shards).reshape(1, ranks.world, shard.kv_heads, -1).any(dim=-1)
        told = ranks.all_gather(mine.to(torch.uint8), [1] * ranks.world, 0)()
        found: Wanted = told.bool().cpu().numpy()
        return found

    def _lengths(self, lengths: Any, like: Tensor) -> Tensor | None:
        """Valid tokens of the whole sequence, int32 ``[batch]`` where the tensors are."""
        if lengths is None:
            return None
        whole = torch.as_tensor(lengths, device=like.device).to(torch.int64)
        return whole.clamp(0, self.call.problem.kv_len).to(torch.int32)

    def _means(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> dict[str, Wait]:
        """Start to gather the block means of all ranks that the call reads."""
        reads = {"qb": self._selection is not None}
        reads["kb"] = reads["qb"] or self._summarises
        reads["vb"] = self._summarises
        started = {}
        for name, x in (("qb", q), ("kb", k), ("vb", v)):
            if not reads[name]:
                continue
            of_queries = name == "qb"
            shards = self._q if of_queries else self._kv
            limits = lengths if self._pads_queries or not of_queries else None
            mean = rainfusion.block_means(
                x,
                side="q" if of_queries else "kv",
                block=self._block,
                policy=Fixed(),
                sink=None,
                tensor_layout=self.call.shard.tensor_layout,
                kv_lengths=None if limits is None else shards.valid(limits, self._rank),
                backend=self.call.backend,
            )
            started[name] = self._gathered(mean, shards, self._block[0 if of_queries else 1])
        return started

    def _gathered(self, means: Tensor, shards: Shards, block: int) -> Wait:
        """Start to gather the means of all blocks, in block order."""
        wait = self.call.ranks.all_gather(means, [-(-length // block) for length in shards.lengths], 2)
        return lambda: shards.to_sequence(wait(), 2, block)

    def _mask(self, q: Tensor, means: Mapping[str, Tensor], operands: Mapping[str, Any]) -> BlockMask | None:
        """The mask of the whole sequence; None for dense attention whose mask is not asked for."""
        call = self.call
        if self._selection is not None:
            given = {**means, **operands}  # means first: the mask is of the kind of the first
            (mask,) = run(call.executable(self._selection, q), given)
            return BlockMask(mask.blocks, mask.q_len, mask.kv_len, mask.block, call.settings.layout())
        if operands["mask"] is not None:
            return operands["mask"]  # type: ignore[no-any-return]
        if "%mask" not in call.returns:
            return None
        plan, p = call.whole[0], call.problem
        kept = torch.ones(p.batch, p.heads, plan.q_axis.blocks, plan.kv_axis.blocks, dtype=torch.bool, device=q.device)
        return BlockMask(kept, p.q_len, p.kv_len, self._block, call.settings.layout())

    def _columns(
        self, rows: Tensor | None, means: Mapping[str, Tensor], lengths: Tensor | None, owner: int | None
    ) -> dict[str, Any]:
        """This rank's rows of the mask and the means, over a rank's shard of the keys, or over all of them."""
        block = self._block[1]

        def columns(x: Tensor, axis: int) -> Tensor:
            return x if owner is None else self._kv.taken(x, owner, axis, block)

        cut: dict[str, Any] = {name: columns(means[name], 2) for name in ("kb", "vb") if name in means}
        if rows is not None:
            kv_len = self.call.problem.kv_len if owner is None else self._kv.lengths[owner]
            cut["mask"] = BlockMask(columns(rows, 3).contiguous(), self.call.shard.q_len, kv_len, self._block)
        if lengths is not None:
            cut["kv_lengths"] = lengths if owner is None else self._kv.valid(lengths, owner)
        return cut

    def _padding(self, lengths: Tensor | None) -> Tensor:
        """Which of this rank's queries are beyond their sample's length, bool ``[batch, 1, tokens]``."""
        assert lengths is not None
        length = self._q.valid(lengths, self._rank)
        return (torch.arange(self.call.shard.q_len, device=lengths.device) >= length[:, None])[:, None, :]

    def _without_padding(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """0 in their place, in a tensor of queries or of the output."""
        padded = self._padding(lengths)
        over_heads = padded if self.call.head_axis == 1 else padded.transpose(1, 2)
        return x.masked_fill(over_heads[..., None], 0)


def _without_query_lengths(plan: Plan) -> Plan:
    """Lengths end the keys alone: they are those of a piece that the queries may not be of."""
    ops = [replace(op, lengths_on_queries=False) if isinstance(op, Attend | AttendMeans) else op for op in plan.ops]
    return replace(plan, ops=tuple(ops))
