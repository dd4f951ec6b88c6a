"""Rung 3: MindIE-SD's older operator, which takes the kept blocks of every row as a list.

Source: MindIE-SD's schema of rainfusionattention, CANN's documentation of aclnnRainFusionAttention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rainfusion.backends.torch_npu.block_mask import KEY_BLOCK
from rainfusion.backends.torch_npu.head_dims import beyond, padded
from rainfusion.backends.torch_npu.rung import Attended, Rung, Wanted

MOST_GROUPED = 128  # query heads a key head: fewer than this, and a divisor of it


class IndexLists(Rung):
    """An operator on tokens of all samples in one row (TND), with lists of key blocks."""

    keywords = frozenset(
        {"query", "key", "value", "select_idx", "select_num_idx", "blockshape", "actual_seq_qlen", "actual_seq_kvlen"}
        | {"q_input_layout", "kv_input_layout", "head_num", "mask_type", "scale", "inner_precise", "block_size"}
    )

    def objections(self, wanted: Wanted) -> Iterator[str]:
        group = wanted.problem.group
        if not wanted.chip.has_index_lists:
            yield f"not on chip {wanted.chip.name}"
        if wanted.is_dense:
            yield "no dense attention: it takes lists of blocks"
        if wanted.needs_lse:
            yield "no log-sum-exp"
        if wanted.block[1] % KEY_BLOCK:
            yield f"no key blocks of {wanted.block[1]} (multiples of {KEY_BLOCK})"
        if group >= MOST_GROUPED or MOST_GROUPED % group:
            yield f"no groups of {group} query heads (divisors of {MOST_GROUPED} below it)"
        yield from beyond(wanted.problem.head_dim)

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wanted: Wanted) -> dict[str, Any]:
        assert mask is not None
        p = wanted.problem
        blocks, counts = kept_blocks(mask)
        return {
            "query": _one_row(padded(q)),
            "key": _one_row(padded(k)),
            "value": _one_row(padded(v)),
            "select_idx": blocks,
            "select_num_idx": counts,
            "blockshape": list(wanted.block),
            "actual_seq_qlen": [p.q_len] * p.batch,
            "actual_seq_kvlen": [p.kv_len] * p.batch,
            "q_input_layout": "TND",
            "kv_input_layout": "TND",
            "head_num": p.kv_heads,
            "mask_type": 0,
            "scale": p.scale,
            "inner_precise": wanted.chip.inner_precise,
            "block_size": 0,
        }

    def results(self, returned: tuple[Any, ...], wanted: Wanted) -> Attended:
        p = wanted.problem
        samples = returned[0].unflatten(0, (p.batch, p.q_len))
        return samples.transpose(1, 2)[..., : p.head_dim], None


def kept_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The kept key blocks of every row of a mask ``[B, H, q blocks, key blocks]``, sample after sample.

    Returns:
        int64 ``[B * q blocks, H, key blocks]``, ascending, then -1; and how many, int64 ``[B * q blocks, H]``.
    """
    columns = mask.shape[-1]
    rows = mask.transpose(1, 2).flatten(0, 1).contiguous()
    numbers = torch.arange(columns, dtype=torch.float32, device=mask.device)  # NPUs sort whole numbers on their CPU
    ranked = torch.where(rows, numbers, columns).sort(dim=-1).values
    return torch.where(ranked < columns, ranked, -1).to(torch.int64), rows.sum(dim=-1)


def _one_row(x: Tensor) -> Tensor:
    """``[B, H, tokens, D]`` as ``[B * tokens, H, D]``."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()
