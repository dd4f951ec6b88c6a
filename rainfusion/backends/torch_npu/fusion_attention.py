"""Rung 4: dense flash attention, with the block mask written out token by token.

Exact, and no faster than dense attention; for plans that no block-sparse operator here can do, while the mask is
small. It also runs plans that skip nothing, without a mask. Source: op-plugin's documentation of npu_fusion_attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from torch import Tensor

from rainfusion.backends.torch_npu.not_finite import finite, spoiled
from rainfusion.backends.torch_npu.rung import Attended, Rung, Wanted
from rainfusion.core.problem import AttentionProblem

FULL_MASK = 1  # sparse_mode: the mask says all
LARGEST_MASK = 2 << 30  # bytes, one a pair of tokens and head
MOST_HEADS, MOST_TOKENS, LARGEST_HEAD_DIM = 256, 1 << 20, 768


class FusionAttention(Rung):
    """Flash attention over all keys, under a mask that is True where a pair of tokens is left out."""

    keywords = frozenset({"query", "key", "value", "head_num", "input_layout", "atten_mask", "scale", "sparse_mode"})

    def objections(self, wanted: Wanted) -> Iterator[str]:
        p = wanted.problem
        size = prod((p.batch, p.heads, p.q_len, p.kv_len))
        if not wanted.is_dense and size > LARGEST_MASK:
            yield f"its mask, token by token, would take {size / 2**30:.1f} GiB (at most {LARGEST_MASK / 2**30:g} GiB)"
        yield from limits(p)

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wanted: Wanted) -> dict[str, Any]:
        return {
            "query": q,
            "key": k,
            "value": v,
            "head_num": wanted.problem.heads,
            "input_layout": "BNSD",
            "atten_mask": None if mask is None else left_out(mask, wanted.block, q.shape[2], k.shape[2]),
            "scale": wanted.problem.scale,
            "sparse_mode": 0 if mask is None else FULL_MASK,
        }

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wanted: Wanted) -> Attended:
        if mask is None:
            return super().attend(q, k, v, mask, wanted)
        out, lse = super().attend(q, finite(k), finite(v), mask, wanted)
        return spoiled(out, lse, k, v, mask, wanted.block)

    def results(self, returned: tuple[Any, ...], wanted: Wanted) -> Attended:
        return returned[0], log_sum_exp(returned) if wanted.needs_lse else None


def limits(p: AttentionProblem) -> Iterator[str]:
    """What the operator does not take, whatever the mask."""
    longest = max(p.q_len, p.kv_len)
    if p.head_dim > LARGEST_HEAD_DIM:
        yield f"no head dim {p.head_dim} (at most {LARGEST_HEAD_DIM})"
    if p.heads > MOST_HEADS:
        yield f"no {p.heads} heads (at most {MOST_HEADS})"
    if longest > MOST_TOKENS:
        yield f"no {longest} tokens (at most {MOST_TOKENS})"


def left_out(mask: Tensor, block: tuple[int, int], q_len: int, kv_len: int) -> Tensor:
    """The pairs of tokens whose blocks a mask skips: bool ``[B, H, q_len, kv_len]``, True where skipped."""
    rows = (~mask).repeat_interleave(block[0], dim=2)[:, :, :q_len]
    return rows.repeat_interleave(block[1], dim=3)[..., :kv_len].contiguous()


def log_sum_exp(returned: tuple[Any, ...]) -> Tensor:
    """The log-sum-exp, float32 ``[B, H, q_len]``, of maximum and sum, each of which is returned eight times."""
    maximum, total = (x[..., 0] for x in returned[1:3])
    lse: Tensor = maximum + total.log()
    return lse
