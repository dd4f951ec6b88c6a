"""Block masks as PyTorch's FlexAttention writes them, and back.

    order, inverse = torch.tensor(layout.order), torch.tensor(layout.inverse)
    out = flex_attention(*(x[:, :, order] for x in (q, k, v)), block_mask=to_flex(mask))[:, :, inverse]

A rainfusion mask lives in block order, so the tokens must stand in that order too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import create_mask

from rainfusion.core.arrays import moved
from rainfusion.core.checks import as_instance
from rainfusion.core.errors import MaskError
from rainfusion.core.mask import BlockMask

# Token pairs of partial blocks looked at together: bounds the memory, whatever the mask.
_PAIRS_AT_ONCE = 2**24


def to_flex(mask: BlockMask) -> FlexMask:
    """The mask for `torch.nn.attention.flex_attention.flex_attention`, on the device where it lives.

    Whole blocks are *full* (no mask function runs on them); kept blocks of a ragged last row or column are
    *partial*, as `create_block_mask` has them.

    Raises:
        MaskError: no block mask.
    """
    as_instance(mask, BlockMask, "mask", MaskError)
    blocks = mask.blocks if isinstance(mask.blocks, Tensor) else moved(mask.blocks, torch.empty(0))
    q_block, kv_block = mask.block
    full = blocks.clone()
    if mask.q_len % q_block:
        full[:, :, -1, :] = False
    if mask.kv_len % kv_block:
        full[:, :, :, -1] = False

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return blocks[b, h, q // q_block, kv // kv_block]

    partial_lists, full_lists = (_index_lists(mask, grid) for grid in (blocks & ~full, full))
    return FlexMask.from_kv_blocks(
        *partial_lists,
        *full_lists,
        BLOCK_SIZE=mask.block,
        mask_mod=mask_mod,
        seq_lengths=(mask.q_len, mask.kv_len),
    )


def _index_lists(mask: BlockMask, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and as many slots as there are key blocks, for which the host need not wait for the device."""
    return BlockMask(grid, mask.q_len, mask.kv_len, mask.block).to_kv_indices(width=grid.shape[-1])


def from_flex(
    flex: FlexMask, q_len: int, kv_len: int, *, batch: int | None = None, heads: int | None = None
) -> BlockMask:
    """The block mask that a flex mask is, if it is one.

    Args:
        flex: its mask function is run on the blocks it calls partial.
        q_len, kv_len: tokens on either side.
        batch, heads: what a flex mask made for one batch or head is repeated to; default: as it stands.

    Raises:
        MaskError: a block that is attended in part, an index out of range, or lengths, batch or heads of
            another mask; no flex mask.
    """
    as_instance(flex, FlexMask, "flex", MaskError, "torch.nn.attention.flex_attention")
    block = (int(flex.BLOCK_SIZE[0]), int(flex.BLOCK_SIZE[1]))
    kept = BlockMask.from_kv_indices(flex.kv_num_blocks, flex.kv_indices, q_len, kv_len, block).blocks
    kept = _whole(flex, kept, (q_len, kv_len))
    if flex.full_kv_num_blocks is not None and flex.full_kv_indices is not None:
        full = BlockMask.from_kv_indices(flex.full_kv_num_blocks, flex.full_kv_indices, q_len, kv_len, block)
        kept |= full.blocks
    shape = (batch or kept.shape[0], heads or kept.shape[1], *kept.shape[2:])
    if any(have not in (1, want) for have, want in zip(kept.shape, shape, strict=True)):
        raise MaskError(f"a flex mask of batch {kept.shape[0]} and {kept.shape[1]} heads cannot be repeated to {shape}")
    return BlockMask(kept.expand(shape).contiguous(), q_len, kv_len, block)


def _whole(flex: FlexMask, partial: Tensor, lengths: tuple[int, int]) -> Tensor:
    """Which of the partial blocks are attended by every token, the others being attended by none."""
    whole = torch.zeros_like(partial)
    at_once = max(1, _PAIRS_AT_ONCE // (flex.BLOCK_SIZE[0] * flex.BLOCK_SIZE[1]))
    for places in torch.split(partial.nonzero(), at_once):
        if not len(places):
            continue
        attended = _attended(flex, places, lengths)
        everywhere = attended.all(dim=-1).all(dim=-1)
        mixed = places[attended.any(dim=-1).any(dim=-1) & ~everywhere].tolist()
        if mixed:
            raise MaskError(
                f"the flex mask attends {len(mixed)} block(s) in part, the first at [batch, head, row, column] "
                f"{mixed[0]}; a block mask keeps or skips whole blocks"
            )
        whole[places.unbind(dim=1)] = everywhere
    return whole


def _attended(flex: FlexMask, places: Tensor, lengths: tuple[int, int]) -> Tensor:
    """The mask function on every token pair of blocks at [batch, head, row, column], bool ``[n, rows, columns]``.

    Past the end of a ragged block its last token stands in, which changes neither *all* nor *any*.
    """
    b, h, row, column = places.unbind(dim=1)
    (q_block, kv_block), (q_len, kv_len) = flex.BLOCK_SIZE, lengths
    q = (row[:, None] * q_block + torch.arange(q_block, device=places.device)).clamp(max=q_len - 1)
    kv = (column[:, None] * kv_block + torch.arange(kv_block, device=places.device)).clamp(max=kv_len - 1)

    def mask_mod(n: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return flex.mask_mod(b[n], h[n], q[n, i], kv[n, j])

    return create_mask(mask_mod, len(places), 1, q_block, kv_block, device=str(places.device))[:, 0]
