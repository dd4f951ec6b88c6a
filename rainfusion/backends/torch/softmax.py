"""softmax(q kᵀ · scale) v and its log-sum-exp, for a batch of short query runs or for every query and key.

Two ways to the same numbers: torch's fused attention, and two matrix products with the softmax done in place between
them. Both keep softmax statistics in float32 (float64 for float64). A row without keys, or whose logits are all minus
infinity, has output 0 and log-sum-exp minus infinity.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Attended = tuple[Tensor, Tensor | None]

# Torch's fused attention for CPUs also knows the log-sum-exp, which the public function does not return.
_FLASH_ON_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

# Scores alive at a time: of one head on a CPU, of all heads on an accelerator, where torch may choose a kernel
# that writes them out (float64, odd head dims).
CPU_SCORE_BYTES = 8 << 20
ACCELERATOR_SCORE_BYTES = 1 << 30


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax statistics and log-sum-exp: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_half(dtype: torch.dtype) -> bool:
    """Whether tensors of that dtype are in half precision, either kind."""
    return dtype in (torch.float16, torch.bfloat16)


def fused_serves(dtype: torch.dtype, device: torch.device, *, needs_lse: bool, returns_lse: bool) -> bool:
    """Whether `fused` gives what is needed there, as exactly as it is needed.

    On a CPU, in half precision, its fast exponential puts the log-sum-exp off in the fifth digit: good enough as the
    weight of a merge, not as a result. On accelerators it computes float32 from two halves of every number, and the
    halves of an infinity are NaN.
    """
    if device.type != "cpu" and dtype == torch.float32:
        return False
    if not needs_lse:
        return True
    return device.type == "cpu" and _FLASH_ON_CPU is not None and not (is_half(dtype) and returns_lse)


def fused(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, *, needs_lse: bool) -> Attended | None:
    """Torch's fused attention.

    Args:
        q: ``[B, H, rows, D]``; k, v: ``[B, H, keys, D]``, all of one dtype.
        hidden: bool, broadcasts to ``[B, H, rows, keys]``; True leaves a key out.

    Returns:
        ``(out, lse)``: ``[B, H, rows, D]`` in the dtype of q; float32 or wider ``[B, H, rows]``, or None where it is
        not needed. None altogether where torch's kernel is not to be trusted with these numbers.

    On accelerators the numbers are not looked at, for which the host would have to wait.
    """
    bias = empty = None
    if hidden is not None:
        bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)
        empty = hidden.all(dim=-1)
    if q.device.type != "cpu" or _FLASH_ON_CPU is None:
        assert not needs_lse
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return (out if empty is None else out.masked_fill(empty[..., None], 0)), None
    # Unlike the public function it reads the channels of a token as neighbours, whatever their stride says.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = _FLASH_ON_CPU(q, k, v, attn_mask=bias, scale=scale)
    if empty is not None:
        out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -math.inf)
    # It loses NaN where a row has no other logit, and calls the log-sum-exp 0 there and where all are -inf.
    doubtful = (lse == 0) | ~lse.isfinite()
    if empty is not None:
        doubtful &= ~empty
    return None if doubtful.any() else (out, lse)


def by_products(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hidden: Tensor | None, scale: float, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Two batched matrix products, computed in the dtype of `scores`.

    Args:
        q: ``[n, rows, D]``; k, v: ``[n, keys, D]``.
        bias: added to the logits, broadcasts to ``[n, rows, keys]``.
        hidden: bool, broadcasts likewise; True leaves a key out, whatever its logit.
        scores: scratch of shape ``[n, rows, keys]``, overwritten.

    Returns:
        ``(out, lse)``: ``[n, rows, D]`` and ``[n, rows]``, in the dtype of `scores`.
    """
    q, k, v = (x.to(scores.dtype) for x in (q, k, v))
    if bias is not None:
        scores.copy_(bias.expand_as(scores))
    # The scale goes onto q: a product with alpha=0 does not look at its operands, and loses their NaN.
    scores.baddbmm_(q * scale, k.mT, beta=0 if bias is None else 1)
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    peak = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    total = scores.sub_(peak).exp_().sum(dim=-1, keepdim=True)
    lse = (peak + total.log()).squeeze(-1)
    # The largest weight is 1, so a smaller total means that every logit was minus infinity: output 0.
    return torch.bmm(scores, v).div_(total.clamp(min=1)).masked_fill_(total == 0, 0), lse


def attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    hidden: Tensor | None,
    scale: float,
    *,
    is_fused: bool,
) -> None:
    """Write softmax(q kᵀ · scale) v to `out` and its log-sum-exp to `lse`, unless that is None.

    Args:
        q, out: ``[B, H, rows, D]``; lse: ``[B, H, rows]``; k, v: ``[B, H or fewer, keys, D]``. Views will do.
        hidden: bool ``[B, keys]``; True leaves a key out, which must be finite.
        is_fused: use torch's fused attention; otherwise two products, a head at a time.
    """
    batch, heads, length, dim = q.shape
    start = 0
    while start < length:
        stop = min(start + _step(q, k, is_fused), length)
        grouped = q[:, :, start:stop].reshape(batch, k.shape[1], -1, dim)  # query heads of one key head, run after run
        needs_lse = lse is not None
        attended = (
            _fused(grouped, k, v, hidden, scale, needs_lse) if is_fused else _by_heads(grouped, k, v, hidden, scale)
        )
        if attended is None:
            is_fused = False
            continue
        out[:, :, start:stop] = attended[0].reshape(batch, heads, -1, dim)
        if lse is not None and attended[1] is not None:
            lse[:, :, start:stop] = attended[1].reshape(batch, heads, -1)
        start = stop


def _step(q: Tensor, k: Tensor, is_fused: bool) -> int:
    """Query tokens to take at a time, so that their scores fit the limit even if they are written out."""
    if is_fused and q.device.type == "cpu":
        return max(q.shape[2], 1)  # never written out there
    limit = CPU_SCORE_BYTES if q.device.type == "cpu" else ACCELERATOR_SCORE_BYTES
    heads = q.shape[0] * q.shape[1] if is_fused else q.shape[1] // k.shape[1]
    return max(1, limit // (heads * k.shape[2] * compute_dtype(q.dtype).itemsize))


def _fused(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, needs_lse: bool) -> Attended | None:
    return fused(q, k, v, None if hidden is None else hidden[:, None, None], scale, needs_lse=needs_lse)


def _by_heads(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> Attended:
    batch, heads, rows, _ = q.shape
    dtype = compute_dtype(q.dtype)
    scores = torch.empty((1, rows, k.shape[2]), dtype=dtype, device=q.device)
    parts = [
        by_products(
            q[b, h, None], k[b, h, None], v[b, h, None], None, None if hidden is None else hidden[b], scale, scores
        )
        for b, h in product(range(batch), range(heads))
    ]
    out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
    return out.view(q.shape), lse.view(batch, heads, rows)
