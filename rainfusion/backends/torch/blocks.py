"""Blocks of tokens: folding, gathering the kept ones, and which query blocks are computed together.

A row is one query block of one head of one sample, numbered as in ``[batch, heads, q blocks]``. Rows that keep
equally many key blocks are computed together: equal counts need no padding, so a few dense rows (first frame, text)
do not set the cost of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# -- tokens in blocks ------------------------------------------------------------------------------


def fold(x: Tensor, order: Tensor | None, block: int, hidden: Tensor | None = None) -> Tensor:
    """``[B, H, tokens, D]`` as contiguous ``[B * H * blocks, block, D]``, the ragged last block padded with zeros.

    Folding once is cheaper than gathering tokens through the order: each block is read many times.

    Args:
        hidden: bool ``[B, tokens]`` in block order; such tokens become zeros.
    """
    missing = -x.shape[2] % block
    ordered = take_tokens(x, order)
    ordered = ordered if hidden is None else ordered.masked_fill(hidden[:, None, :, None], 0)
    padded = pad(ordered, (0, 0, 0, missing)) if missing else ordered
    return padded.reshape(-1, block, x.shape[3]).contiguous()


def tokens_of(folded: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """Folded blocks ``[B * H * blocks, block, ...]`` seen as tokens ``[B, H, length, ...]``; a view."""
    return folded.view(batch, heads, -1, *folded.shape[2:])[:, :, :length]


def take_tokens(x: Tensor, order: Tensor | None) -> Tensor:
    """The tokens of ``[B, H, tokens, ...]`` in another order; None leaves them as they stand."""
    return x if order is None else torch.index_select(x, 2, order)


def beyond(lengths: Tensor, tokens: int) -> Tensor:
    """Block positions at or beyond each sample's length: int ``[B]`` to bool ``[B, tokens]``."""
    return torch.arange(tokens, device=lengths.device) >= lengths[:, None]


# -- gathering -------------------------------------------------------------------------------------


class Scratch:
    """Flat buffers, one a use, reused from chunk to chunk: fresh pages would cost more than what is copied there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor; what was taken before for the same use is overwritten."""
        flat = self._flat.get(use)
        if flat is None or flat.numel() < prod(shape) or flat.dtype != dtype:
            flat = self._flat[use] = torch.empty(prod(shape), dtype=dtype, device=self._device)
        return flat[: prod(shape)].view(shape)


def kept_first(mask: Tensor) -> Tensor:
    """Columns of every row, the kept ones first, either sort ascending: bool ``[n, columns]`` to int64 likewise."""
    return torch.sort(mask.to(torch.uint8), dim=-1, descending=True, stable=True)[1]


def gather(blocks: Tensor, picked: Tensor, use: str, scratch: Scratch) -> Tensor:
    """Blocks ``[blocks, block, D]`` named by int64 ``[n, width]`` as keys ``[n, width * block, D]``, in scratch."""
    _, block, dim = blocks.shape
    n, width = picked.shape
    flat = blocks.flatten(1)  # one long row a block copies twice as fast as a block of short rows
    into = scratch.take(use, (n * width, block * dim), blocks.dtype)
    torch.index_select(flat, 0, picked.reshape(-1), out=into)
    return into.view(n, width * block, dim)


# -- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """Rows that keep `width` key blocks each.

    Attributes:
        rows: int64 ``[n]``, ascending.
        first_block: int64 ``[n]``, where the blocks of the row's key/value head start among all folded ones.
    """

    width: int
    rows: Tensor
    first_block: Tensor


@dataclass(frozen=True)
class Rows:
    """All rows: in buckets up to query block `dense_from`, and from there on those that keep every key."""

    buckets: tuple[Bucket, ...]
    dense_from: int


def counts_of(mask: Tensor) -> np.ndarray:
    """Kept key blocks of every row, int64 ``[B, H, q blocks]``, read back from the device: the one host sync."""
    return np.asarray(mask.sum(dim=-1).cpu())


def bucket(counts: np.ndarray, kv_heads: int, kv_blocks: int, device: torch.device) -> Rows:
    """Sort rows by count, except the last query blocks of all heads, where these keep everything.

    Args:
        counts: kept key blocks of every row, int ``[B, H, q blocks]``.
    """
    _, heads, q_blocks = counts.shape
    partial = np.flatnonzero((counts < kv_blocks).any(axis=(0, 1)))
    dense_from = int(partial[-1]) + 1 if partial.size else 0
    flat = counts.ravel()
    head_of_row, block_of_row = np.divmod(np.arange(flat.size), q_blocks)
    sample, head = np.divmod(head_of_row, heads)
    first_block = (sample * kv_heads + head // (heads // kv_heads)) * kv_blocks

    def bucket_of(width: int) -> Bucket:
        rows = np.flatnonzero((flat == width) & (block_of_row < dense_from))
        return Bucket(width, *(torch.from_numpy(x).to(device) for x in (rows, first_block[rows])))

    return Rows(tuple(bucket_of(width) for width in np.unique(counts[:, :, :dense_from]).tolist()), dense_from)
