"""The one kernel: a whole plan on NPU tensors, from the caller's token order and back.

Every tensor is brought into block order once, and the mask chain reads it there: by the semantics, in float32.
Nothing is read back to the host and no shape depends on data, so nothing waits for the device; what the device
needs beside the tensors is copied there when the plan is lowered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rainfusion.backends.torch_npu import ladder
from rainfusion.backends.torch_npu.block_means import SkippedBlocks
from rainfusion.backends.torch_npu.chips import Chip
from rainfusion.backends.torch_npu.rung import Wanted
from rainfusion.core import semantics
from rainfusion.core.backend import Segment
from rainfusion.core.ir import Plan
from rainfusion.core.semantics import selection_constant


class WholePlan:
    """All operations of one plan on one device. Calls share constants only, so it is thread-safe.

    Raises:
        LoweringError: no operator of the ladder can attend by it.
    """

    def __init__(self, segment: Segment, plan: Plan, device: torch.device, chip: Chip) -> None:
        self._segment, self._plan = segment, plan
        self._wanted = Wanted.by(plan, chip)
        ladder.rung_for(self._wanted)  # refuse before the first call, if at all
        names = [op.name for op in segment.ops]
        first_attend = segment.ops[names.index("attend")]
        self._orders = first_attend.args[3:5]
        self._inverse = torch.tensor(plan.layout.inverse, device=device) if self._orders[0] else None
        self._selection = None
        if "select" in names:
            self._selection = torch.tensor(selection_constant(plan.policy, plan.q_axis, plan.kv_axis), device=device)
        self._skipped = SkippedBlocks(plan, device) if "merge" in names else None
        self._reads_means = not (self._selection is None and self._skipped is None)

    @property
    def how(self) -> str:
        """Which operator attends, for ``print(executable)``."""
        return f"attend by {'; '.join(ladder.refusals(self._wanted)) or ladder.rung_for(self._wanted)}"

    def __call__(self, *tensors: Tensor) -> tuple[Any, ...]:
        """From the tensors named by ``segment.inputs`` to those named by ``segment.outputs``."""
        given = dict(zip(self._segment.inputs, tensors, strict=True))
        q_order, kv_order = (given[name] if name else None for name in self._orders)
        q, k, v = _ordered(given["%q"], q_order), _ordered(given["%k"], kv_order), _ordered(given["%v"], kv_order)
        key_means = self._means(k) if self._reads_means else None
        mask = given.get("%mask") if self._selection is None else self._selected(q, key_means)
        out, lse = ladder.attend(q, k, v, mask, self._wanted)
        if self._skipped is not None:
            rest = self._skipped(q, key_means, self._means(v), mask)
            out, lse = semantics.merge(out.to(torch.float32), lse, *rest)
        made = {"%out": self._restored(out.to(q.dtype)), "%lse": self._restored(lse), "%mask": mask}
        return tuple(made[name] for name in self._segment.outputs)

    def _means(self, x: Tensor) -> Any:
        return semantics.block_mean(x, None, block=self._plan.block[1])

    def _selected(self, q: Tensor, key_means: Tensor | None) -> Any:
        plan = self._plan
        query_means = semantics.block_mean(q, None, block=plan.block[0])
        score = semantics.block_score(query_means, key_means, scale=plan.problem.scale)
        return semantics.select(score, policy=plan.policy, q=plan.q_axis, kv=plan.kv_axis, constant=self._selection)

    def _restored(self, x: Tensor | None) -> Tensor | None:
        """Tokens back in the caller's order."""
        return None if x is None else _ordered(x, self._inverse)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """Tokens of ``[B, H, tokens, ...]`` in another order; contiguous either way, as the operators need it."""
    return x.contiguous() if order is None else x.index_select(2, order)
