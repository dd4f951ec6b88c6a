"""From a run of plan operations to kernel launches.

One class serves every run the backend offers: whatever part of the plan it covers, the same stages follow each other,
each left out where the plan has no use for it.

    fold      q, k, v ─► blocks and their means      (block_mean, and the token order)
    list      means, or a given mask ─► BlockLists   (block_score, select)
    schedule  lists ─► order of the query blocks
    attend    blocks, lists ─► output, log-sum-exp   (attend; with summaries attend, attend, merge)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rainfusion.backends.triton import chip
from rainfusion.backends.triton.attend import WIDEST, Attend
from rainfusion.backends.triton.fold_blocks import Folded, fold_blocks
from rainfusion.backends.triton.operands import Attention, Means
from rainfusion.backends.triton.schedule import heavy_first, heavy_first_on_device
from rainfusion.backends.triton.score_blocks import score_blocks
from rainfusion.backends.triton.select_blocks import (
    BlockLists,
    Wanted,
    every_block,
    list_blocks,
    select_top_k,
    select_top_p,
)
from rainfusion.core.backend import Device, Segment
from rainfusion.core.errors import LoweringError
from rainfusion.core.ir import Plan
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.policy import TopK, TopP

MEANS, SELECT = ("block_mean", "block_mean"), ("block_score", "select")
RUNS = (
    (*MEANS, "block_mean", *SELECT, "attend", "attend", "merge"),
    (*MEANS, *SELECT, "attend"),
    (*MEANS, "attend", "attend", "merge"),
    (*MEANS, *SELECT),
    ("attend",),
)
"""The runs of operations that are lowered as one: whole plans, with and without summaries, and their parts."""


_captured: set[Lowered] = set()
"""What a CUDA graph has captured stays for good: the graph replays on its constants, however long it lives."""


def build(segment: Segment, plan: Plan, device: Device) -> Callable[..., tuple[Tensor | None, ...]]:
    """The function of one run of operations.

    Raises:
        LoweringError: a head dim beyond what the attention kernels hold.
    """
    if segment.ops[-1].name != "select" and plan.problem.head_dim > WIDEST:
        raise LoweringError(f"head dim {plan.problem.head_dim} is beyond {WIDEST}, the widest its kernels hold")
    return Lowered(segment, plan, torch.device(str(device)))


class Lowered:
    """A run of operations on one device. Calls share constants, and the choice of a kernel, which locks itself."""

    def __init__(self, segment: Segment, plan: Plan, device: torch.device) -> None:
        self._segment, self._plan, self._device = segment, plan, device
        names = [op.name for op in segment.ops]
        self._selects, self._summarises = "select" in names, "merge" in names
        made = segment.ops[-1].outs
        self._wants_lse = len(made) > 1 and made[1] in segment.outputs
        self._wanted = Wanted(mask="%mask" in segment.outputs, bias=self._summarises)
        # A log-sum-exp is good to float32's last digits, which means rounded to 16 bits are not.
        self._mean_is_wide = self._wants_lse or plan.problem.dtype == "float32"
        mean_dtype = torch.float32 if self._mean_is_wide else getattr(torch, plan.problem.dtype)
        self._attend = None
        if "attend" in names:
            self._attend = Attend.of(plan, device, mean_dtype=mean_dtype if self._summarises else None)
        q, kv = plan.q_axis, plan.kv_axis
        order = self._order(q, kv)
        self._q_order, self._kv_order = (order if self._walks(axis) else None for axis in (q, kv))
        if isinstance(plan.policy, TopK) and self._selects:
            self._quotas = torch.tensor(plan.policy.row_quotas(q, kv), dtype=torch.int32, device=device)
        self._every = every_block(kv.blocks, device) if plan.is_dense else None
        sequences = plan.problem.batch * plan.problem.heads
        counts = plan.row_counts
        self._tiles = None if counts is None else heavy_first(counts, sequences, device)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        """The values named by ``segment.outputs`` from those named by ``segment.inputs``."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.add(self)
        values = dict(zip(self._segment.inputs, tensors, strict=True))
        q, k, v = self.fold(values)
        lists = self.list(q, k, values.get("%mask"))
        made: dict[str, Tensor | None] = {} if lists.mask is None else {"%mask": lists.mask}
        if self._attend is not None:
            assert v is not None
            made.update(zip(self._segment.ops[-1].outs, self.attend(q, k, v, lists), strict=False))
        return tuple(made[name] for name in self._segment.outputs)

    @property
    def how(self) -> str:
        """Which attention kernel this is, for `print(executable)`."""
        return "" if self._attend is None else str(self._attend)

    def _walks(self, axis: BlockedAxis) -> bool:
        """Whether the tokens of one side are walked through the order, rather than as they stand."""
        return axis.ordered and self._plan.order == "window" and not self._plan.is_dense

    def _order(self, *axes: BlockedAxis) -> Tensor | None:
        """Position to token, where a side needs it."""
        if not any(self._walks(axis) for axis in axes):
            return None
        return torch.tensor(self._plan.layout.order, dtype=torch.int32, device=self._device)

    def fold(self, values: dict[str, Tensor]) -> tuple[Folded, Folded, Folded | None]:
        """q, k and v in the order of their blocks, with the means that something reads."""

        def fold(name: str, order: Tensor | None, side: int, *, scored: bool, attended: bool) -> Folded:
            x = values[name]
            copy = self._attend is not None and self._attend.wants_copy(x, order)
            mean = scored or (attended and self._mean_is_wide)
            half_mean = attended and not self._mean_is_wide
            return fold_blocks(x, order, self._plan.block[side], copy=copy, mean=mean, half_mean=half_mean)

        q = fold("%q", self._q_order, 0, scored=self._selects, attended=False)
        k = fold("%k", self._kv_order, 1, scored=self._selects, attended=self._summarises)
        if self._attend is None:
            return q, k, None
        return q, k, fold("%v", self._kv_order, 1, scored=False, attended=self._summarises)

    def list(self, q: Folded, k: Folded, mask: Tensor | None) -> BlockLists:
        """The key blocks every query block keeps."""
        if self._every is not None:
            return self._every
        if mask is not None:
            return list_blocks(mask, self._plan.kv_axis, self._wanted)
        plan, rows, kv = self._plan, self._plan.q_axis, self._plan.kv_axis
        assert q.mean is not None
        assert k.mean is not None
        precision = chip.precision(self._device)
        score = score_blocks(q.mean, k.mean, plan.problem.scale, rows.free_blocks, precision)
        if isinstance(plan.policy, TopK):
            return select_top_k(score, self._quotas, rows.blocks, kv, self._wanted)
        assert isinstance(plan.policy, TopP)
        return select_top_p(score, plan.policy, rows.blocks, kv, self._wanted)

    def attend(self, q: Folded, k: Folded, v: Folded, lists: BlockLists) -> tuple[Tensor, Tensor | None]:
        """Output, and log-sum-exp where somebody reads it, over the listed blocks."""
        assert self._attend is not None
        problem = self._plan.problem
        means = None
        if self._summarises:
            mean_k, mean_v = (x.mean if self._mean_is_wide else x.half_mean for x in (k, v))
            assert mean_k is not None
            assert mean_v is not None
            means = Means(mean_k, mean_v)
        given = Attention(
            q.tokens,
            k.tokens,
            v.tokens,
            problem.q_len,
            problem.kv_len,
            self._plan.block,
            lists,
            heavy_first_on_device(lists.counts) if self._tiles is None else self._tiles,
            problem.scale,
            out_order=self._q_order,
            means=means,
        )
        out = _empty_output(q.tokens, problem.q_shape, problem.tensor_layout)
        lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device) if self._wants_lse else None
        self._attend(given, out, lse)
        return out, lse


def _empty_output(like: Tensor, shape: tuple[int, ...], tensor_layout: str) -> Tensor:
    """``[B, H, q_len, D]``, contiguous once the caller sees it in its own layout.

    Triton's interpreter cuts numbers off instead of rounding them to bfloat16, so there it writes float32.
    """
    interpreted = chip.architecture(like.device) == chip.INTERPRETED
    out = like.new_empty(shape, dtype=torch.float32 if interpreted else like.dtype)
    return out if tensor_layout == "bhsd" else out.transpose(1, 2)
