"""From a part of a plan to kernel launches.

One class serves every part that is one attention or a piece of it: the same stages follow each other, and each is
left out where the part has no operation for it. Values that another part makes (means, scores, a mask) come in and go
out by name.

    fold      tokens ─► tokens in block order, block means     (block_mean, quantise, and the orders that attend reads)
    list      means, scores or a mask ─► BlockLists            (block_score, select)
    attend    tokens, lists, means ─► output, log-sum-exp      (attend, attend_means, merge)
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from rainfusion.backends.torch_arrays import all_modes_off
from rainfusion.backends.triton import hardware
from rainfusion.backends.triton.attend import LARGEST_HEAD_DIM, AttentionKernel, HopperUnavailableError
from rainfusion.backends.triton.eight_bits import EightBits
from rainfusion.backends.triton.fold_blocks import fold_blocks
from rainfusion.backends.triton.folds import Blocks, folds_of
from rainfusion.backends.triton.operands import Attention, Means
from rainfusion.backends.triton.score_blocks import score_blocks
from rainfusion.backends.triton.select_blocks import (
    BlockLists,
    Extras,
    every_block,
    heavy_first,
    heavy_first_on_device,
    list_blocks,
    select_blocks,
)
from rainfusion.core.axis import BlockedAxis
from rainfusion.core.backend import Device, Segment
from rainfusion.core.errors import LoweringError
from rainfusion.core.locks import ProcessLock
from rainfusion.core.ops import (
    AllBlocks,
    Attend,
    AttendMeans,
    AttendMeansQuantised,
    AttendQuantised,
    BlockMean,
    BlockScore,
    Merge,
    Op,
    Quantise,
    Select,
)
from rainfusion.core.plan import Plan
from rainfusion.core.stages import Stages

UNDERSTOOD: frozenset[type[Op]] = frozenset({BlockMean, BlockScore, Select, Attend, AttendMeans, Merge})
"""The operations that are lowered, all of them or any part of them, as one step."""

UNDERSTOOD_IN_8_BITS: frozenset[type[Op]] = frozenset(
    {BlockMean, BlockScore, Select, Quantise, AttendQuantised, AttendMeansQuantised, Merge}
)
"""The same on Hopper, for attention in 8 bits."""

Values = Mapping[str, Tensor]


class CapturedTensors:
    """Constants that CUDA graphs read, kept alive for them.

    A graph replays on the memory of the tensors it captured, however long it lives, and nothing tells when it ends. So
    what a captured call reads is kept until `clear`. Constants are shared between plans: this grows with the layouts,
    budgets and devices that are captured, not with calls or graphs.
    """

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}
        self._lock = ProcessLock()

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """Keep these tensors."""
        with self._lock:
            self._tensors.update((id(x), x) for x in tensors)

    def clear(self) -> None:
        """Let go of all of them. Graphs that were captured before must not be replayed afterwards."""
        with self._lock:
            self._tensors.clear()

    def __len__(self) -> int:
        return len(self._tensors)


def build(segment: Segment, plan: Plan, device: Device, *, captured: CapturedTensors) -> Lowered:
    """The function of one segment.

    Raises:
        LoweringError: operations that are not one attention, or a head dim beyond what the attention kernels hold.
    """
    stages = Stages.of(segment)
    _check(stages, segment, plan)
    with all_modes_off():  # constants serve later calls too, whatever modes the caller is under now
        return Lowered(segment, stages, plan, torch.device(str(device)), captured)


def _check(stages: Stages, segment: Segment, plan: Plan) -> None:
    """Refuse, with a LoweringError, what the kernels do not compute exactly as it is defined."""
    attend, chosen = stages.attend, stages.select
    if stages.attend_means is not None and attend is None:
        raise LoweringError("means are attended in the same kernel as tokens")
    if attend is None:
        return
    q, kv_len = plan.types[attend.q], plan.types[attend.k].shape[2]
    if q.shape[3] > LARGEST_HEAD_DIM:
        raise LoweringError(f"head dim {q.shape[3]} is beyond {LARGEST_HEAD_DIM}, the largest its kernels hold")
    if attend.lengths_on_queries and q.shape[2] != kv_len:
        raise LoweringError("lengths of keys on queries of another length")
    if chosen is not None and chosen.lengths != attend.lengths:
        raise LoweringError("selection and attention read other lengths")
    if chosen is not None and (chosen.kv.length, chosen.kv.block) != (kv_len, attend.block[1]):
        raise LoweringError("selection and attention cut keys into other blocks")
    if stages.attend_means is not None and stages.attend_means.kv_len != kv_len:
        raise LoweringError("means of other keys than are attended")
    if stages.merge is not None:
        between = {*stages.merge.reads}.intersection(segment.outputs)
        if between:
            raise LoweringError(f"{min(between)} is read outside, and the kernel never writes it")


class Lowered:
    """A segment on one device. Calls share constants, and the choice of a kernel, which locks itself."""

    def __init__(
        self, segment: Segment, stages: Stages, plan: Plan, device: torch.device, captured: CapturedTensors
    ) -> None:
        self._segment, self._stages, self._plan, self._device = segment, stages, plan, device
        self._captured = captured
        self._wants_lse = stages.lse is not None and segment.wants(stages.lse)
        self._extras = Extras(
            mask=stages.select is not None and segment.wants(stages.select.mask), bias=stages.attend_means is not None
        )
        # A log-sum-exp is good to float32's last digits, which means rounded to 16 bits are not.
        attend = stages.attend
        self._has_wide_means = self._wants_lse or (attend is not None and plan.types[attend.q].dtype == "float32")
        self._eight_bits = EightBits.of(stages, segment, wants_lse=self._wants_lse)
        self._folds = folds_of(stages, segment, self._eight_bits, has_wide_means=self._has_wide_means)
        orders = {fold.order for fold in self._folds}
        orders |= set() if attend is None else {attend.order, attend.kv_order}
        self._orders = {name: self._order(name) for name in orders if name is not None}
        self._precision = hardware.precision(device)
        self._every: BlockLists | None = None
        self._tiles: Tensor | None = None
        self._kernel = None if attend is None else self._prepare(attend)

    def _prepare(self, attend: Attend) -> AttentionKernel:
        """Constants of the attention, and its kernel."""
        plan, device = self._plan, self._device
        self._shape = plan.types[attend.q].shape
        batch, heads, kv_len = *self._shape[:2], plan.types[attend.k].shape[2]
        self._kv = BlockedAxis(kv_len, attend.block[1], False, kv_len)
        counts = plan.counts_of(attend.mask)
        if counts is not None:
            self._tiles = heavy_first(counts, batch, heads, device)
        is_dense = attend.mask is None or isinstance(plan.maker(attend.mask), AllBlocks)
        if is_dense and self._stages.attend_means is None:
            self._every = every_block(self._kv.blocks, device)
        self._may_keep_nothing = _may_keep_nothing(attend, plan, counts)
        dtype = plan.types[attend.q if self._eight_bits is None else self._eight_bits.q.x].dtype
        mean_dtype = torch.float32 if self._has_wide_means else getattr(torch, dtype)
        is_read = any(self._stages.out in op.reads for op in plan.ops if op not in self._segment.ops)
        # Triton's interpreter cuts numbers off instead of rounding them to bfloat16, so there it writes float32.
        is_wide = is_read or hardware.architecture(device) == hardware.INTERPRETED
        self._out_dtype = torch.float32 if is_wide else getattr(torch, dtype)
        if self._eight_bits is not None:
            return AttentionKernel.in_8_bits(attend, plan, device)
        return AttentionKernel.of(attend, plan, device, mean_dtype if self._stages.attend_means is not None else None)

    @property
    def kernel(self) -> AttentionKernel | None:
        """The attention kernel, where the segment attends."""
        return self._kernel

    def with_kernel(self, kernel: AttentionKernel) -> Lowered:
        """The same segment with another attention kernel, for comparisons."""
        other = object.__new__(Lowered)
        other.__dict__.update(self.__dict__, _kernel=kernel)
        return other

    @property
    def how(self) -> str:
        """Which attention kernel this is, for `print(executable)`."""
        return "" if self._kernel is None else str(self._kernel)

    def __call__(self, values: Values) -> dict[str, Tensor]:
        """The values named by ``segment.outputs`` from those named by ``segment.inputs``."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.keep(self._constants(values))
        try:
            return self._on_kernels(values)
        except HopperUnavailableError:  # nothing else attends in 8 bits here
            results: dict[str, Tensor] = {}
            for op in self._segment.ops:
                results.update(op.evaluate(ChainMap(results, values)))  # type: ignore[arg-type]
            return {name: results[name] for name in self._segment.outputs}

    def _on_kernels(self, values: Values) -> dict[str, Tensor]:
        blocks = self.fold(values)
        results = dict(blocks.means)
        lists = self.list(values, blocks, results)
        if self._kernel is not None:
            assert lists is not None
            out, lse = self.attend(values, blocks, lists)
            assert self._stages.out is not None
            results[self._stages.out] = out
            if lse is not None:
                assert self._stages.lse is not None
                results[self._stages.lse] = lse
        return {name: results[name] for name in self._segment.outputs}

    # -- stages ------------------------------------------------------------------------------------

    def fold(self, values: Values) -> Blocks:
        """Tokens in block order, and the means that something reads."""
        blocks = Blocks()
        for fold in self._folds:
            x = values[fold.x]
            order = self._ordered(values, fold.order)
            lengths = None if fold.lengths is None else values[fold.lengths]
            copy = bool(fold.attended_as) and self._kernel is not None and self._kernel.wants_copy(x, order, lengths)
            folded = fold_blocks(
                x,
                order,
                fold.block,
                lengths,
                copy=copy,
                mean=fold.mean is not None,
                half_mean=fold.half_mean is not None,
            )
            for operand in fold.attended_as:
                blocks.tokens[operand] = folded.tokens
            if fold.mean is not None and folded.mean is not None:
                blocks.means[fold.mean] = folded.mean
            if fold.half_mean is not None and folded.half_mean is not None:
                blocks.half_means[fold.half_mean] = folded.half_mean
        if self._eight_bits is not None:
            blocks.quantised = self._eight_bits(values, partial(self._ordered, values), blocks.means)
        return blocks

    def list(self, values: Values, blocks: Blocks, results: dict[str, Tensor] | None = None) -> BlockLists | None:
        """The key blocks that every query block keeps, where something reads them.

        Args:
            results: takes the score and the mask, where something outside reads them.
        """
        results = {} if results is None else results
        score, chosen, attend = self._stages.score, self._stages.select, self._stages.attend
        scores = None if score is None else self._score(score, values, blocks)
        if score is not None and scores is not None and self._segment.wants(score.score):
            results[score.score] = scores
        if chosen is not None:
            lists = self._select(chosen, values, scores)
            if lists.mask is not None:
                results[chosen.mask] = lists.mask
            return lists
        if attend is None:
            return None
        if self._every is not None:
            return self._every
        assert attend.mask is not None
        lengths = None if attend.lengths is None else values[attend.lengths]
        return list_blocks(values[attend.mask], lengths, self._kv, self._extras)

    def attend(self, values: Values, blocks: Blocks, lists: BlockLists) -> tuple[Tensor, Tensor | None]:
        """Output, and log-sum-exp where something reads it, over the listed blocks."""
        op, kernel = self._stages.attend, self._kernel
        assert op is not None
        assert kernel is not None
        x = blocks.quantised
        q, k, v = (blocks.tokens[name] for name in "qkv") if x is None else (x.q, x.k, x.v)
        attention = Attention(
            q,
            k,
            v,
            self._shape[2],
            self._kv.length,
            op.block,
            lists,
            heavy_first_on_device(lists.counts) if self._tiles is None else self._tiles,
            op.scale,
            out_order=self._ordered(values, op.order),
            means=self._means(values, blocks) if x is None else None,
            lengths=None if op.lengths is None else values[op.lengths],
            lengths_on_queries=op.lengths_on_queries,
            may_keep_nothing=self._may_keep_nothing,
            quantised=x,
        )
        out = self._empty_output(q)
        lse = torch.empty(self._shape[:3], dtype=torch.float32, device=out.device) if self._wants_lse else None
        kernel(attention, out, lse)
        return out, lse

    # -- parts of stages ---------------------------------------------------------------------------

    def _score(self, op: BlockScore, values: Values, blocks: Blocks) -> Tensor:
        qb, kb = (_mean(name, values, blocks) for name in (op.qb, op.kb))
        chosen = self._stages.select
        is_partial = chosen is not None and not self._segment.wants(op.score)
        rows = chosen.q.free_blocks if chosen is not None and is_partial else qb.shape[2]
        prior = None if op.prior is None else values[op.prior].contiguous()
        return score_blocks(qb, kb, op.scale, rows, self._precision, prior)

    def _select(self, op: Select, values: Values, scores: Tensor | None) -> BlockLists:
        scores = values[op.score].contiguous() if scores is None else scores
        quotas = values[op.quotas].to(torch.int32).contiguous()
        lengths = None if op.lengths is None else values[op.lengths]
        return select_blocks(scores, quotas, lengths, op, self._extras)

    def _means(self, values: Values, blocks: Blocks) -> Means | None:
        op = self._stages.attend_means
        if op is None:
            return None
        if self._has_wide_means:
            return Means(_mean(op.kb, values, blocks), _mean(op.vb, values, blocks))
        dtype = getattr(torch, self._plan.types[op.q].dtype)
        kb, vb = (
            blocks.half_means[name] if name in blocks.half_means else values[name].to(dtype).contiguous()
            for name in (op.kb, op.vb)
        )
        return Means(kb, vb)

    def _empty_output(self, like: Tensor) -> Tensor:
        """``[B, H, q_len, D]``, contiguous once the caller sees it in its own layout."""
        if self._plan.problem.tensor_layout == "bhsd":
            return like.new_empty(self._shape, dtype=self._out_dtype)
        batch, heads, length, dim = self._shape
        return like.new_empty((batch, length, heads, dim), dtype=self._out_dtype).transpose(1, 2)

    # -- constants ---------------------------------------------------------------------------------

    def _order(self, name: str) -> Tensor | None:
        """An order that planning knows, int32 on the device, one for all plans with the same layout; else None."""
        maker = self._plan.maker(name)
        if maker is None or maker.reads:
            return None
        anonymous = replace(maker, **{role: f"%{role}" for role in maker.results})  # type: ignore[arg-type]
        role = next(role for role, made in maker.results.items() if made == name)
        key = (str(self._device), anonymous, role)
        known = _orders.get(key)
        if known is None:
            order = self._plan.constant(name)
            known = _orders[key] = torch.tensor(order, dtype=torch.int32, device=self._device)
        return known

    def _ordered(self, values: Values, name: str | None) -> Tensor | None:
        """An order by the name of its value."""
        if name is None:
            return None
        known = self._orders[name]
        return values[name].to(torch.int32) if known is None else known

    def _constants(self, values: Values) -> Iterable[Tensor]:
        """Every tensor that calls read and callers do not own."""
        yield from (x for x in self._orders.values() if x is not None)
        if self._tiles is not None:
            yield self._tiles
        if self._every is not None:
            yield from (self._every.counts, self._every.indices)
        for op, operand in ((self._stages.select, "quotas"), (self._stages.score, "prior")):
            name: str | None = getattr(op, operand, None)
            maker = self._plan.maker(name)
            if name is not None and maker is not None and not maker.reads:
                yield values[name]


_orders: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()
"""Orders on devices, for as long as something lowered reads them."""


def _mean(name: str, values: Values, blocks: Blocks) -> Tensor:
    """A block mean in float32, made here or outside."""
    return blocks.means[name] if name in blocks.means else values[name].contiguous()


def _may_keep_nothing(attend: Attend, plan: Plan, counts: np.ndarray | None) -> bool:
    """Whether a query block may keep no key block."""
    if counts is not None:
        return bool((counts < 1).any())
    chosen = plan.maker(attend.mask)
    if not isinstance(chosen, Select):
        return True
    quotas = plan.constant(chosen.quotas)
    has_protected = chosen.kv.free_blocks < chosen.kv.blocks
    return not has_protected and (quotas is None or bool((quotas < 1).any()))
