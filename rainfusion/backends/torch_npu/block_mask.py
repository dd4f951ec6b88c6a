"""Rungs 1 and 2: the operators that take the block mask itself, torch_npu's and MindIE-SD's of the same form.

Source: op-plugin's schema and documentation of npu_block_sparse_attention, CANN's of aclnnBlockSparseAttention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rainfusion.backends.torch_npu.head_dims import beyond, padded
from rainfusion.backends.torch_npu.rung import Attended, Rung, Wanted

KEY_BLOCK = 128  # key blocks are multiples of it


class BlockMask(Rung):
    """An operator that reads a mask of 8-bit numbers, 1 where a block is attended."""

    keywords = frozenset(
        {"query", "key", "value", "block_sparse_mask", "block_shape", "q_input_layout", "kv_input_layout"}
        | {"num_key_value_heads", "scale_value", "inner_precise", "actual_seq_lengths", "actual_seq_lengths_kv"}
        | {"softmax_lse_flag"}
    )

    def objections(self, wanted: Wanted) -> Iterator[str]:
        if wanted.is_dense:
            yield "no dense attention: it takes a mask"
        if wanted.block[1] % KEY_BLOCK:
            yield f"no key blocks of {wanted.block[1]} (multiples of {KEY_BLOCK})"
        yield from beyond(wanted.problem.head_dim)

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wanted: Wanted) -> dict[str, Any]:
        assert mask is not None
        p = wanted.problem
        return {
            "query": padded(q),
            "key": padded(k),
            "value": padded(v),
            "block_sparse_mask": mask.to(torch.int8),  # nothing converts it on the way to CANN, which takes no other
            "block_shape": list(wanted.block),
            "q_input_layout": "BNSD",
            "kv_input_layout": "BNSD",
            "num_key_value_heads": p.kv_heads,
            "scale_value": p.scale,
            "inner_precise": wanted.chip.inner_precise,
            "actual_seq_lengths": [p.q_len] * p.batch,
            "actual_seq_lengths_kv": [p.kv_len] * p.batch,
            "softmax_lse_flag": int(wanted.needs_lse),
        }

    def results(self, returned: tuple[Any, ...], wanted: Wanted) -> Attended:
        out, lse = returned[:2]  # without the flag the second is memory that nobody wrote
        return out[..., : wanted.problem.head_dim], lse.squeeze(-1) if wanted.needs_lse else None
