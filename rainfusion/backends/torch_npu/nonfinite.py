"""NaN and infinity under a dense kernel with a mask.

Such a kernel multiplies what is masked out by a weight of 0, and 0 times NaN is NaN: a bad number in a block that
no row attends to would reach every row. So it is given finite numbers, and the rows that attend to a bad one are
spoiled afterwards. They become NaN, also where dense attention would give an infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rainfusion.core.ops import block_mean


def finite(x: Tensor) -> Tensor:
    """The same tensor with 0 in place of NaN and infinity."""
    return torch.where(x.isfinite(), x, 0)


def spoiled(
    out: Tensor, lse: Tensor | None, k: Tensor, v: Tensor, mask: Tensor, block: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """NaN where a query block attends to a key block that is not finite.

    A bad key spoils the row and its log-sum-exp, a bad value its own channel.
    """
    bad_keys, bad_values = (_in_blocks(~x.isfinite(), block[1], mask.shape[1]) for x in (k, v))
    bad_keys = bad_keys.amax(dim=-1, keepdim=True)
    attended = mask.to(torch.float32)
    out = out.masked_fill(_of_tokens(attended @ (bad_keys + bad_values), block[0], out.shape[2]), torch.nan)
    if lse is not None:
        lse = lse.masked_fill(_of_tokens(attended @ bad_keys, block[0], out.shape[2]).squeeze(-1), torch.nan)
    return out, lse


def _in_blocks(is_bad: Tensor, block: int, heads: int) -> Tensor:
    """Above 0 where a key block has a bad number in that channel: float32 ``[B, H, key blocks, D]``."""
    share: Tensor = block_mean(is_bad.to(torch.float32), block=block)
    return share.repeat_interleave(heads // share.shape[1], dim=1)


def _of_tokens(rows: Tensor, block: int, length: int) -> Tensor:
    """Query blocks ``[B, H, q blocks, ...]`` above 0, token by token."""
    return (rows > 0).repeat_interleave(block, dim=2)[:, :, :length]
