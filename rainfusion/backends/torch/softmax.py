"""softmax(q kᵀ · scale + bias) v for a batch of short query runs, and its log-sum-exp.

Two ways to the same numbers: torch's fused attention, and two matrix products with the softmax done in
place between them. Both keep softmax statistics in float32 (float64 for float64).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rainfusion.core.ir import Plan

# Torch's fused attention for CPUs also knows the log-sum-exp, which the public function does not return.
_FLASH_ON_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax statistics and log-sum-exp: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_half(plan: Plan) -> bool:
    """Whether the tensors are in half precision, either kind."""
    return plan.problem.dtype in ("float16", "bfloat16")


def fused_serves(plan: Plan, device: torch.device, *, needs_lse: bool) -> bool:
    """Whether `fused` gives what is needed there, as exactly as it is needed.

    In half precision its fast exponential puts the log-sum-exp off in the fifth digit: good enough as the weight of
    a merge, not as a result.
    """
    if not needs_lse:
        return True
    return device.type == "cpu" and _FLASH_ON_CPU is not None and not (is_half(plan) and "%lse" in plan.returns)


def fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, *, needs_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Torch's fused attention.

    Args:
        q: ``[B, H, rows, D]``; k, v: ``[B, H, keys, D]``, all of one dtype.
        bias: broadcasts to ``[B, H, rows, keys]``; minus infinity leaves a key out.

    Returns:
        ``(out, lse)``: ``[B, H, rows, D]`` in the dtype of q; float32 or wider ``[B, H, rows]``, or None
        where it is not needed.
    """
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type != "cpu" or _FLASH_ON_CPU is None:
        assert not needs_lse
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
    # Unlike the public function it reads the channels of a token as neighbours, whatever their stride says.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = _FLASH_ON_CPU(q, k, v, attn_mask=bias, scale=scale)
    infinite = lse == math.inf
    if infinite.any():  # a logit of infinity makes its row NaN; in half precision torch gives 0
        out, lse = out.masked_fill(infinite[..., None], math.nan), lse.masked_fill(infinite, math.nan)
    return out, lse


def by_products(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Two batched matrix products, computed in the dtype of `scores`.

    Args:
        q: ``[n, rows, D]``; k, v: ``[n, keys, D]``.
        bias: broadcasts to ``[n, rows, keys]``; minus infinity leaves a key out.
        scores: scratch of shape ``[n, rows, keys]``, overwritten.

    Returns:
        ``(out, lse)``: ``[n, rows, D]`` and ``[n, rows]``, in the dtype of `scores`.
    """
    q, k, v = (x.to(scores.dtype) for x in (q, k, v))
    if bias is not None:
        scores.copy_(bias.expand_as(scores))
    scores.baddbmm_(q, k.mT, beta=0 if bias is None else 1, alpha=scale)
    peak = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    total = scores.sub_(peak).exp_().sum(dim=-1, keepdim=True)
    lse = (peak + total.log()).squeeze(-1)
    # The largest weight is 1, so a smaller total means that every logit was minus infinity: output 0.
    return torch.bmm(scores, v).div_(total.clamp_(min=1)), lse
