"""Attention: what an attention kernel is given, the same for the plain kernel and for Hopper's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rainfusion.backends.triton.select_blocks import BlockLists

LOG2_E = 1.0 / math.log(2.0)
"""Kernels keep logits in base 2, whose exponential is one instruction."""


@dataclass(frozen=True)
class Means:
    """The means of all key blocks; those of skipped blocks are attended, weighed by ``BlockLists.bias``.

    Attributes:
        k, v: ``[B, H or fewer, key blocks, D]`` contiguous, in the dtype of the tokens or in float32.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Attention:
    """One attention call.

    Attributes:
        q: ``[B, H, tokens, D]``; k, v: ``[B, H or fewer, tokens, D]``. Any strides.
        q_len, kv_len: tokens that count; folded tensors may have more.
        block: tokens in a query block and in a key block.
        lists: the key blocks each query block keeps, with their bias where there are means.
        tiles: int32 ``[B * H * q blocks]``, the query blocks in the order in which they are started.
        scale: factor on the logits.
        q_order, kv_order: int32, position to token, where q or k and v are read through it; None where they stand in
            block order. Only the plain kernel takes them, and no plan is lowered so: folding first was faster.
        out_order: the same for the output.
        means: what stands for skipped blocks, if these count.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_len: int
    kv_len: int
    block: tuple[int, int]
    lists: BlockLists
    tiles: Tensor
    scale: float
    q_order: Tensor | None = None
    kv_order: Tensor | None = None
    out_order: Tensor | None = None
    means: Means | None = None

    @property
    def q_blocks(self) -> int:
        """Query blocks, the ragged last one counted in."""
        return -(-self.q_len // self.block[0])

    @property
    def kv_blocks(self) -> int:
        """Key blocks, the ragged last one counted in."""
        return -(-self.kv_len // self.block[1])
