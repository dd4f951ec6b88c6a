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
    """The means of all key blocks; those of omitted blocks are attended, weighted by ``BlockLists.bias``.

    Attributes:
        k, v: ``[B, H or fewer, key blocks, D]`` contiguous, in the dtype of the tokens or in float32.
    """

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class QuantisedMeans:
    """`Quantised.k`, `Quantised.k_scale` and `Quantised.v` of the means of all key blocks, 128 means a block."""

    k: Tensor
    k_scale: Tensor
    v: Tensor


@dataclass(frozen=True)
class Quantised:
    """What `quantise_blocks` makes of q, k and v in block order; blocks of 128 tokens, zeros beyond the last one.

    Attributes:
        q: int8 or float8_e4m3fn ``[B, H, q blocks * 128, D]``; q_scale: float32 ``[B, H, q blocks]``.
        k: the same ``[B, Hkv, key blocks * 128, D]``, less its centre; k_scale: float32 ``[B, Hkv, key blocks, 64]``,
            every scale 64 times, as consumers read them.
        v: float8_e4m3fn ``[B, Hkv, key blocks * D, 128]``, each block transposed, its keys in `KEY_ORDER`.
        v_scale, v_centre: float32 ``[B, Hkv, D]``.
        lse_shift: float32 ``[B, H, q blocks * 128]``, products of queries with the centre of k, before rounding; None
            where they are not needed.
        means: what stands for omitted blocks, if these count.
    """

    q: Tensor
    q_scale: Tensor
    k: Tensor
    k_scale: Tensor
    v: Tensor
    v_scale: Tensor
    v_centre: Tensor
    lse_shift: Tensor | None = None
    means: QuantisedMeans | None = None

    @property
    def dim(self) -> int:
        """The head dim."""
        return self.q.shape[3]


@dataclass(frozen=True)
class Attention:
    """One attention call. Tokens stand in block order.

    Attributes:
        q: ``[B, H, tokens, D]``; k, v: ``[B, H or fewer, tokens, D]``. Any strides.
        q_len, kv_len: tokens that count; folded tensors may have more.
        block: tokens in a query block and in a key block.
        lists: the key blocks each query block keeps, with their bias where there are means.
        tiles: int32 ``[B * H * q blocks]``, the query blocks in the order in which they are started.
        scale: factor on the logits.
        out_order: int32, position to token, where the output is written in another order than that of the blocks.
        means: what stands for omitted blocks, if these count.
        lengths: int32 ``[B]``, valid keys of each sample; the others take no part.
        lengths_on_queries: queries at or beyond the length give output 0 and log-sum-exp minus infinity.
        may_keep_nothing: whether a row of `lists` may be empty.
        quantised: in 8 bits, what is read in place of q, k, v and means.
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
    out_order: Tensor | None = None
    means: Means | None = None
    lengths: Tensor | None = None
    lengths_on_queries: bool = False
    may_keep_nothing: bool = True
    quantised: Quantised | None = None

    @property
    def q_blocks(self) -> int:
        """Query blocks, the ragged last one counted in."""
        return -(-self.q_len // self.block[0])

    @property
    def kv_blocks(self) -> int:
        """Key blocks, the ragged last one counted in."""
        return -(-self.kv_len // self.block[1])
