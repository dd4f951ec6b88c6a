"""What ``omitted="summary"`` adds: a second attention, over the means of the blocks that each row skips.

It is dense flash attention in float32 over one key a block: kept blocks are masked out, and the logarithm of a
block's token count is its bias. Merged with the attention over tokens by log-sum-exp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rainfusion.backends.torch_npu.fusion_attention import FULL_MASK, limits, log_sum_exp
from rainfusion.backends.torch_npu.operators import call, trouble
from rainfusion.core.ir import Plan

OPERATOR = "npu::npu_fusion_attention"
KEYWORDS = frozenset({"query", "key", "value", "head_num", "input_layout", "pse", "atten_mask", "scale", "sparse_mode"})
LARGEST_PART = 1 << 30  # bytes of mask and float32 queries that are alive at a time


def objections(plan: Plan) -> list[str]:
    """Why summaries cannot be added here; empty where they can, or are not asked for."""
    if plan.omitted != "summary" or plan.is_dense:
        return []
    reasons = (*limits(plan.problem), trouble(OPERATOR, KEYWORDS))
    return [f"no omitted='summary': {OPERATOR}: {why}" for why in reasons if why]


class SkippedBlocks:
    """The second attention of one plan on one device."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        p, kv = plan.problem, plan.kv_axis
        self._scale, self._block = p.scale, plan.block[0]
        bias = torch.tensor(np.log(kv.counts), dtype=torch.float32)
        self._bias = bias.expand(p.batch, p.heads, 1, kv.blocks).contiguous().to(device)
        bytes_a_block = p.batch * p.heads * self._block * (kv.blocks + 2 * p.head_dim * 4)
        self._step = max(1, LARGEST_PART // bytes_a_block)

    def __call__(self, q: Tensor, key_means: Any, value_means: Any, kept: Any) -> tuple[Tensor, Tensor]:
        """Attend to the means of what is not `kept`.

        Args:
            q: ``[B, H, q_len, D]`` in block order.
            key_means, value_means: float32 ``[B, H or fewer, key blocks, D]``.
            kept: bool ``[B, H, q blocks, key blocks]``.

        Returns:
            Output and log-sum-exp in float32, ``[B, H, q_len, D]`` and ``[B, H, q_len]``; 0 and minus infinity
            for rows that keep everything.
        """
        parts = [
            self._attend(
                q[:, :, start * self._block : (start + self._step) * self._block],
                key_means,
                value_means,
                kept[:, :, start : start + self._step],
            )
            for start in range(0, kept.shape[2], self._step)
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def _attend(self, q: Tensor, key_means: Tensor, value_means: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        masked_out = kept.repeat_interleave(self._block, dim=2)[:, :, : q.shape[2]].contiguous()
        returned = call(
            OPERATOR,
            {
                "query": (q.to(torch.float32) * self._scale).contiguous(),
                "key": key_means,
                "value": value_means,
                "head_num": q.shape[1],
                "input_layout": "BNSD",
                "pse": self._bias,
                "atten_mask": masked_out,
                "scale": 1.0,  # it would scale the bias too
                "sparse_mode": FULL_MASK,
            },
        )
        # What the operator gives for a row without keys is not documented, so it is not looked at.
        skips_nothing = masked_out.all(dim=-1)
        out = returned[0].masked_fill(skips_nothing[..., None], 0)
        return out, log_sum_exp(returned).masked_fill(skips_nothing, -torch.inf)
