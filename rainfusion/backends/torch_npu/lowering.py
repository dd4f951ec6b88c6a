"""The one kernel: attention on NPU tensors, from the caller's token order and back, with the mask chain before it.

Every tensor is brought into block order once, and the mask chain reads it there: by the definitions, in float32.
Blocks are selected without a wait for the device and without a shape that depends on data; what the device needs
beside the tensors is copied there when the plan is lowered. Lengths of padded samples alone are read back, before
anything else of a call is queued, where they are on the device and the operator takes them as numbers.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rainfusion.backends.torch_arrays import all_modes_off
from rainfusion.backends.torch_npu import detection, operators
from rainfusion.backends.torch_npu.operators import (
    FULL_MASK,
    Attended,
    Request,
    Tensors,
    call,
    fusion_limits,
    log_sum_exp,
    trouble,
)
from rainfusion.core.backend import Device, Kernel, Segment
from rainfusion.core.errors import LoweringError
from rainfusion.core.ops import Attend, AttendMeans, BlockMean, BlockScore, Merge, Op, Select, block_mean, merge, select
from rainfusion.core.plan import Plan
from rainfusion.core.problem import AttentionProblem
from rainfusion.core.stages import Stages

Values = Mapping[str, Any]

MEANS_OPERATOR = "npu::npu_fusion_attention"
MEANS_KEYWORDS = frozenset(
    {"query", "key", "value", "head_num", "input_layout", "pse", "atten_mask", "scale", "sparse_mode"}
)
LARGEST_PART = 1 << 30  # bytes of mask and float32 queries that are alive at a time

# For the estimate in `seconds_saved`. Of a 910B, as published: float16 operations and bytes of memory a second.
_OPERATIONS, _BYTES = 3e14, 1.6e12
# Assumed: seconds that one more operator takes to start, and how much longer a block-sparse operator takes than a dense
# one for the same pairs of tokens.
_CALL, _SURCHARGE = 2e-5, 0.25


def build(segment: Segment, plan: Plan, device: Device) -> Callable[[Values], Values]:
    """The kernel of one attention, with whatever of its mask chain and its summaries the segment holds.

    Raises:
        LoweringError: no attention over tokens, or no operator here that can do it.
    """
    stages = Stages.of(segment)
    if stages.attend is None:
        raise LoweringError("the mask chain runs by its definitions; only attention has operators")
    with all_modes_off():
        return LoweredAttention(segment, stages.attend, plan, torch.device(str(device)))


KERNEL = Kernel(frozenset({BlockMean, BlockScore, Select, Attend, AttendMeans, Merge}), build)


def means_objections(plan: Plan) -> list[str]:
    """Why the means of omitted blocks cannot be attended here; empty where they can, or are not in the plan."""
    if not plan.summarises:
        return []
    reasons = (*fusion_limits(plan.problem), trouble(MEANS_OPERATOR, MEANS_KEYWORDS))
    return [f"no omitted='summary': {MEANS_OPERATOR}: {why}" for why in reasons if why]


class LoweredAttention:
    """The operations of one segment on one device. Calls share constants only, so it is thread-safe.

    Raises:
        LoweringError: no operator can attend by it.
    """

    def __init__(self, segment: Segment, attend: Attend, plan: Plan, device: torch.device) -> None:
        self.segment, self.attend = segment, attend
        self.request = Request.of(attend, plan, detection.chip())
        operators.operator_for(self.request)  # refuse before the first call, if at all
        self.split = Split.of(attend, plan, self.request)
        counts = plan.counts_of(attend.mask)
        self.may_be_empty = self.request.has_lengths or counts is None or not counts.all()
        means = segment.find(AttendMeans)
        self.means = None if means is None else OmittedMeans(means, plan, device)
        # All tokens as lengths: the definition of a selection by mass then reads nothing from the host.
        kv_len = plan.types[attend.k].shape[2]
        self.full_lengths = torch.full((self.request.problem.batch,), kv_len, dtype=torch.int32).to(device)

    @property
    def how(self) -> str:
        """Which operator attends, for ``print(executable)``."""
        how = f"attend by {'; '.join(operators.refusals(self.request)) or operators.operator_for(self.request)}"
        if self.split is None or not self.split.is_possible:
            return how
        rows, dense = self.split.dense.problem.q_len, operators.operator_for(self.split.dense)
        return f"{how}, the last {rows} rows by {dense}, which is estimated to be faster"

    def __call__(self, values: Values) -> Values:
        """Run the operations, in program order."""
        one_call = _Call(self, values)
        for op in self.segment.ops:
            one_call.run(op)
        return one_call.made


@dataclass(frozen=True)
class Split:
    """The rows that attend to all keys, which are the last in block order, by another operator than the others.

    Attributes:
        sparse: the rows that do not; dense: those that do.
    """

    sparse: Request
    dense: Request

    @classmethod
    def of(cls, attend: Attend, plan: Plan, request: Request) -> Split | None:
        """How to split; None where no rows are known to be dense, or one call for all is estimated to be faster."""
        chosen = next((op for op in plan.ops if isinstance(op, Select) and op.mask == attend.mask), None)
        if chosen is None or request.has_lengths:
            return None
        p = request.problem
        start = min(chosen.q.free_blocks * request.block[0], p.q_len)
        if start in (0, p.q_len) or seconds_saved(p, p.q_len - start) <= 0:
            return None
        sparse = replace(request, problem=replace(p, q_len=start))
        return cls(sparse, replace(request, is_dense=True, problem=replace(p, q_len=p.q_len - start)))

    @property
    def is_possible(self) -> bool:
        """Whether there are operators for both, and the one for the sparse rows spends less on them."""
        sparse, dense = map(operators.first_for, (self.sparse, self.dense))
        return sparse is not None and sparse.is_sparse and dense is not None

    def __call__(self, given: Tensors) -> Attended:
        """Attend to both and put the results together."""
        assert given.mask is not None
        start = self.sparse.problem.q_len
        mask = given.mask[:, :, : -(-start // self.sparse.block[0])].contiguous()
        sparse = Tensors(given.q[:, :, :start].contiguous(), given.k, given.v, mask)
        dense = Tensors(given.q[:, :, start:].contiguous(), given.k, given.v, None)
        (out, lse), (rest, rest_lse) = operators.attend(sparse, self.sparse), operators.attend(dense, self.dense)
        joined = None if lse is None or rest_lse is None else torch.cat([lse, rest_lse], dim=2)
        return torch.cat([out, rest], dim=2), joined


def seconds_saved(p: AttentionProblem, rows: int) -> float:
    """What it saves to give dense rows to a dense operator: an estimate by assumed figures, with nothing measured.

    The dense operator is taken to be faster for the same pairs of tokens; in return queries and output are copied
    once more, and one more operator starts.
    """
    heads = p.batch * p.heads
    faster = _SURCHARGE * 4 * p.head_dim * heads * rows * p.kv_len / _OPERATIONS
    copies = 2 * 4 * p.head_dim * heads * p.q_len / _BYTES  # read and written, two bytes each
    return faster - copies - _CALL


class _Call:
    """One call: the values made so far, and the tensors in block order."""

    def __init__(self, lowered: LoweredAttention, values: Values) -> None:
        self._lowered = lowered
        self.made: dict[str, Any] = {}
        self._values: ChainMap[str, Any] = ChainMap(self.made, values)  # type: ignore[arg-type]  # never written to
        self._in_blocks: dict[tuple[str, str | None], Tensor] = {}
        self._attended: dict[str | None, Tensor | None] = {}  # results in block order, until they are merged
        # Before anything is queued, for what a call has queued would have to be waited for.
        attend = lowered.attend
        lengths = self._read(attend.lengths)
        takes_numbers = lengths is not None and operators.operator_for(lowered.request).takes_numbers
        self._numbers = on_host(lengths) if takes_numbers else None

    def run(self, op: Op) -> None:
        """Run one operation."""
        match op:
            case BlockMean():
                lengths = self._read(op.lengths)
                self.made[op.mean] = block_mean(self._ordered(op.x, op.order), None, lengths, block=op.block)
            case BlockScore():
                self.made.update(op.evaluate(self._values))
            case Select():
                self.made[op.mask] = self._select(op)
            case Attend():
                self._finish(op, *self._attend(op))
            case AttendMeans():
                assert self._lowered.means is not None
                kb, vb, kept = (self._values[name] for name in (op.kb, op.vb, op.mask))
                out, lse = self._lowered.means(self._ordered(op.q, op.order), kb, vb, kept, self._read(op.lengths))
                self._finish(op, out, lse)
            case Merge():
                self._merge(op)

    def _read(self, name: str | None) -> Any:
        return None if name is None else self._values[name]

    def _ordered(self, name: str, order: str | None) -> Tensor:
        """A tensor in block order, contiguous as operators need it; brought there once a call."""
        if (name, order) not in self._in_blocks:
            self._in_blocks[name, order] = _take(self._values[name], self._read(order))
        return self._in_blocks[name, order]

    def _select(self, op: Select) -> Any:
        lengths = self._read(op.lengths)
        if op.mass is not None and lengths is None:
            lengths = self._lowered.full_lengths
        score, quotas = self._values[op.score], self._values[op.quotas]
        return select(score, quotas, lengths, q=op.q, kv=op.kv, mass=op.mass, over=op.over)

    def _attend(self, op: Attend) -> tuple[Tensor, Tensor | None]:
        """Output and log-sum-exp in block order; 0 and minus infinity where a row has no keys."""
        lowered, lengths, mask = self._lowered, self._read(op.lengths), self._read(op.mask)
        q = self._ordered(op.q, op.order)
        k, v = (self._ordered(name, op.kv_order) for name in (op.k, op.v))
        hidden = None
        if lengths is not None:
            hidden = _beyond(lengths, k.shape[2])
            k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))  # NaN there must not spread
        kept = mask if mask is None or lengths is None else _within(mask, lengths, op.block[1])
        empty = _without_keys(kept, lengths) if lowered.may_be_empty else None
        if kept is not None and empty is not None:  # what operators do with a row without blocks is not documented
            kept = torch.cat([kept[..., :1] | empty[..., None], kept[..., 1:]], dim=-1)
        q_lengths = self._numbers if op.lengths_on_queries else None
        out, lse = self._by_operators(Tensors(q, k, v, kept, hidden, q_lengths, self._numbers))
        if empty is not None:
            rows = empty if mask is None else empty.repeat_interleave(op.block[0], dim=2)[:, :, : q.shape[2]]
            out, lse = _emptied(out, lse, rows)
        return out, lse

    def _by_operators(self, given: Tensors) -> Attended:
        lowered = self._lowered
        if lowered.split is not None and lowered.split.is_possible:
            with suppress(LoweringError):  # an operator that CANN turned out to lack; the other way is left
                return lowered.split(given)
        return operators.attend(given, lowered.request)

    def _finish(self, op: Attend | AttendMeans, out: Tensor, lse: Tensor | None) -> None:
        """Keep results for a merge, and hand them out in the caller's order where they leave the kernel."""
        lengths = self._read(op.lengths)
        if lengths is not None and op.lengths_on_queries:
            out, lse = _emptied(out, lse, _beyond(lengths, out.shape[2])[:, None])
        self._attended |= {op.out: out, op.lse: lse}
        self._hand_out(op, out, lse, op.inverse)

    def _merge(self, op: Merge) -> None:
        out_a, lse_a, out_b, lse_b = (self._attended[name] for name in (op.out_a, op.lse_a, op.out_b, op.lse_b))
        assert out_a is not None
        assert out_b is not None
        out, lse = merge(out_a.to(torch.float32), lse_a, out_b, lse_b)
        attend = self._lowered.segment.find(Attend)
        assert attend is not None
        self._hand_out(op, out, lse, attend.inverse)

    def _hand_out(self, op: Attend | AttendMeans | Merge, out: Tensor, lse: Tensor | None, inverse: str | None) -> None:
        order = self._read(inverse)
        for name, value in ((op.out, out), (op.lse, lse)):
            if name in self._lowered.segment.outputs and value is not None:
                self.made[name] = _take(value, order)


class OmittedMeans:
    """Attention over the means of the blocks that each row omits.

    Dense flash attention in float32 over one key a block: kept blocks are masked out, and the logarithm of a block's
    token count is its bias. Merged with the attention over tokens by log-sum-exp.
    """

    def __init__(self, op: AttendMeans, plan: Plan, device: torch.device) -> None:
        batch, heads, _, dim = plan.types[op.q].shape
        columns = plan.types[op.kb].shape[2]
        self._scale, self._block = op.scale, op.block[0]
        starts = np.arange(columns) * op.block[1]
        counts = np.minimum(op.block[1], op.kv_len - starts)
        self._starts = torch.from_numpy(starts).to(torch.int32).to(device)
        self._counts = torch.from_numpy(counts).to(torch.int32).to(device)
        bias = torch.from_numpy(np.log(counts)).to(torch.float32)
        self._bias = bias.expand(batch, heads, 1, columns).contiguous().to(device)
        self._step = max(1, LARGEST_PART // (batch * heads * self._block * (columns + 2 * dim * 4)))

    def __call__(
        self, q: Tensor, key_means: Any, value_means: Any, kept: Any, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attend to the means of what is not `kept`.

        Args:
            q: ``[B, H, q_len, D]`` in block order.
            key_means, value_means: float32 ``[B, H or fewer, key blocks, D]``.
            kept: bool ``[B, H, q blocks, key blocks]``.
            lengths: int ``[B]``; only tokens below it count.

        Returns:
            Output and log-sum-exp in float32, ``[B, H, q_len, D]`` and ``[B, H, q_len]``; 0 and minus infinity
            for rows that keep everything.
        """
        bias = self._bias
        if lengths is not None:
            counts = torch.minimum((lengths[:, None] - self._starts).clamp(min=0), self._counts)[:, None, None]
            kept = kept | (counts == 0)
            bias = bias.mul(0) + counts.clamp(min=1).to(torch.float32).log()
        parts = [
            self._attend(
                q[:, :, start * self._block : (start + self._step) * self._block],
                key_means,
                value_means,
                kept[:, :, start : start + self._step],
                bias,
            )
            for start in range(0, kept.shape[2], self._step)
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def _attend(
        self, q: Tensor, key_means: Tensor, value_means: Tensor, kept: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        masked_out = kept.repeat_interleave(self._block, dim=2)[:, :, : q.shape[2]].contiguous()
        returned = call(
            MEANS_OPERATOR,
            {
                "query": (q.to(torch.float32) * self._scale).contiguous(),
                "key": key_means,
                "value": value_means,
                "head_num": q.shape[1],
                "input_layout": "BNSD",
                "pse": bias,
                "atten_mask": masked_out,
                "scale": 1.0,  # it would scale the bias too
                "sparse_mode": FULL_MASK,
            },
        )
        # What the operator gives for a row without keys is not documented, so it is not looked at.
        omits_nothing = masked_out.all(dim=-1)
        out = returned[0].masked_fill(omits_nothing[..., None], 0)
        return out, log_sum_exp(returned).masked_fill(omits_nothing, -torch.inf)


def _take(x: Tensor, order: Tensor | None) -> Tensor:
    """Tokens of ``[B, H, tokens, ...]`` in another order; contiguous either way."""
    return x.contiguous() if order is None else x.index_select(2, order)


def _beyond(lengths: Tensor, tokens: int) -> Tensor:
    """Block positions at or beyond each sample's length: int ``[B]`` to bool ``[B, tokens]``."""
    return torch.arange(0, tokens, 1, dtype=lengths.dtype, device=lengths.device) >= lengths[:, None]


def _within(mask: Tensor, lengths: Tensor, block: int) -> Tensor:
    """The mask without the key blocks that begin at or beyond a sample's length."""
    starts = torch.arange(0, mask.shape[-1] * block, block, dtype=lengths.dtype, device=lengths.device)
    return mask & (starts < lengths[:, None])[:, None, None]


def _without_keys(mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Query blocks that have no key: bool ``[B, H, q blocks]``, or ``[B, 1, 1]`` of all of a sample's."""
    if mask is None:
        return None if lengths is None else (lengths < 1)[:, None, None]
    return mask.sum(dim=-1) == 0


def on_host(lengths: Tensor) -> tuple[int, ...]:
    """Lengths as numbers. Those that were given on the host are known; others are copied, which waits for them."""
    known = getattr(lengths, "given_on_host", None)
    return tuple(map(int, lengths.cpu().tolist() if known is None else known))


def _emptied(out: Tensor, lse: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """0 and minus infinity where bool ``[B, 1 or H, tokens or 1]`` says so."""
    out = out.masked_fill(rows[..., None], 0)
    return out, None if lse is None else lse.masked_fill(rows, -torch.inf)
