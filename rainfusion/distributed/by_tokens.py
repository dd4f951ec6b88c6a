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
from rainfusion.distributed.shards import check_whole_blocks, starts_of

_Piece = tuple[int, int, Tensor]  # first key token, tokens, keys and values ``[2, ...]``


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
        check_whole_blocks(call.q_lengths, self._block[0], "q")
        check_whole_blocks(call.kv_lengths, self._block[1], "k")
        self._first_row = starts_of(call.q_lengths)[call.ranks.rank]
        self._kv_starts = starts_of(call.kv_lengths)
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
        pieces = self.call.kv_lengths if self._ring else (self.call.problem.kv_len,)
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
        pieces = self._travel(torch.stack([k, v]))
        lengths = self._lengths(operands["kv_lengths"], q)
        means = self._means(q, k, v, lengths)
        mask = self._mask(q, means, {**operands, "kv_lengths": lengths})
        if self._pads_queries and call.settings.precision is not None:
            q = self._without_padding(q, lengths)  # which would take part in the scales of its blocks
        out = lse = None
        for start, kv_len, (keys, values) in pieces:
            arguments = {"q": q, "k": keys, "v": values, **self._columns(mask, means, lengths, start, kv_len)}
            part, part_lse = run(call.executable(self._attentions[kv_len], q), arguments)
            wide = part.to(part_lse.dtype)
            if out is None:
                out, lse = wide, part_lse
            else:
                out, lse = rainfusion.merge(out, lse, wide, part_lse, tensor_layout=call.shard.tensor_layout)
        assert out is not None
        assert lse is not None
        if self._pads_queries:
            out, lse = self._without_padding(out, lengths), lse.masked_fill(self._padding(lengths), float("-inf"))
        found = {"%out": out.to(q.dtype), "%lse": lse, "%mask": mask}
        return [found[name] for name in call.returns]

    def _travel(self, keys_and_values: Tensor) -> Iterator[_Piece]:
        """Start to move keys and values, and give the pieces as they come."""
        call, axis, shape = self.call, self.call.token_axis + 1, keys_and_values.shape
        if not self._ring:
            return self._at_once(call.ranks.all_gather(keys_and_values, call.kv_lengths, axis))
        shapes = [(*shape[:axis], length, *shape[axis + 1 :]) for length in call.kv_lengths]
        arriving = call.ranks.around(keys_and_values, shapes)
        return ((self._kv_starts[rank], call.kv_lengths[rank], piece) for rank, piece in arriving)

    def _at_once(self, wait: Wait) -> Iterator[_Piece]:
        yield 0, self.call.problem.kv_len, wait()

    def _lengths(self, lengths: Any, like: Tensor) -> Tensor | None:
        """Valid tokens of the whole sequence, int32 ``[batch]`` where the tensors are."""
        if lengths is None:
            return None
        whole = torch.as_tensor(lengths, device=like.device).to(torch.int64)
        return whole.clamp(0, self.call.problem.kv_len).to(torch.int32)

    def _means(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> dict[str, Tensor]:
        """The block means of all ranks that the call reads."""
        reads = {"qb": self._selection is not None}
        reads["kb"] = reads["qb"] or self._summarises
        reads["vb"] = self._summarises
        started = {}
        for name, x in (("qb", q), ("kb", k), ("vb", v)):
            if not reads[name]:
                continue
            of_queries = name == "qb"
            first = self._first_row if of_queries else self._kv_starts[self.call.ranks.rank]
            limits = lengths if self._pads_queries or not of_queries else None
            mean = rainfusion.block_means(
                x,
                side="q" if of_queries else "kv",
                block=self._block,
                policy=Fixed(),
                sink=None,
                tensor_layout=self.call.shard.tensor_layout,
                kv_lengths=None if limits is None else _of_piece(limits, first, x.shape[self.call.token_axis]),
                backend=self.call.backend,
            )
            tokens = self.call.q_lengths if of_queries else self.call.kv_lengths
            blocks = [-(-n // self._block[0 if of_queries else 1]) for n in tokens]
            started[name] = self.call.ranks.all_gather(mean, blocks, 2)
        return {name: wait() for name, wait in started.items()}

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
        self, mask: BlockMask | None, means: Mapping[str, Tensor], lengths: Tensor | None, start: int, kv_len: int
    ) -> dict[str, Any]:
        """This rank's rows of the mask and the means, over a piece of the keys."""
        q_len, (of_rows, of_columns) = self.call.shard.q_len, self._block
        columns = slice(start // of_columns, -(-(start + kv_len) // of_columns))
        cut: dict[str, Any] = {name: means[name][:, :, columns] for name in ("kb", "vb") if name in means}
        if mask is not None:
            rows = slice(self._first_row // of_rows, -(-(self._first_row + q_len) // of_rows))
            cut["mask"] = BlockMask(mask.blocks[:, :, rows, columns].contiguous(), q_len, kv_len, self._block)
        if lengths is not None:
            cut["kv_lengths"] = _of_piece(lengths, start, kv_len)
        return cut

    def _padding(self, lengths: Tensor | None) -> Tensor:
        """Which of this rank's queries are beyond their sample's length, bool ``[batch, 1, tokens]``."""
        assert lengths is not None
        length = _of_piece(lengths, self._first_row, self.call.shard.q_len)
        return (torch.arange(self.call.shard.q_len, device=lengths.device) >= length[:, None])[:, None, :]

    def _without_padding(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """0 in their place, in a tensor of queries or of the output."""
        padded = self._padding(lengths)
        over_heads = padded if self.call.head_axis == 1 else padded.transpose(1, 2)
        return x.masked_fill(over_heads[..., None], 0)


def _of_piece(lengths: Tensor, start: int, tokens: int) -> Tensor:
    """Valid tokens of the piece of a sequence that begins at `start`."""
    return (lengths - start).clamp(0, tokens)


def _without_query_lengths(plan: Plan) -> Plan:
    """Lengths end the keys alone: they are those of a piece that the queries may not be of."""
    ops = [replace(op, lengths_on_queries=False) if isinstance(op, Attend | AttendMeans) else op for op in plan.ops]
    return replace(plan, ops=tuple(ops))
