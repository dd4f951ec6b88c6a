"""Sizes of a block mask: its grid, its tokens, and what an index or a choice of heads means for them."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from rainfusion.core.arrays import Array, moved
from rainfusion.core.checks import as_int, shown
from rainfusion.core.errors import MaskError
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask_forms import grid_namespace

_AXES = ("batch", "heads", "query blocks", "key blocks")


def checked_sizes(q_len: Any, kv_len: Any, block: Any) -> tuple[int, int, tuple[int, int]]:
    """Lengths and blocks as plain positive ints."""
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise MaskError(f"block={shown(block)} is not a pair; give (query block, key block)")
    q_block, kv_block = (as_int(size, "block", MaskError) for size in block)
    return as_int(q_len, "q_len", MaskError), as_int(kv_len, "kv_len", MaskError), (q_block, kv_block)


def grid_of(q_len: int, kv_len: int, block: tuple[int, int]) -> tuple[int, int]:
    """Query blocks and key blocks."""
    return -(-q_len // block[0]), -(-kv_len // block[1])


def index_ranges(items: Any, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Start and stop on each of the four axes."""
    given = list(items) if isinstance(items, tuple) else [items]
    dots = [i for i, item in enumerate(given) if item is Ellipsis] or [len(given)]
    given[dots[0] : dots[0] + 1] = [slice(None)] * (4 - sum(item is not Ellipsis for item in given))
    if len(given) != 4 or len(dots) > 1:
        raise MaskError("a mask has four axes; give mask[batch, heads, query blocks, key blocks]")
    return [_range(item, size, axis) for item, size, axis in zip(given, shape, _AXES, strict=True)]


def _range(item: Any, size: int, axis: str) -> tuple[int, int]:
    whole = isinstance(item, slice)
    try:
        if isinstance(item, bool) or (whole and item.step not in (None, 1)):
            raise TypeError
        first = 0 if whole and item.start is None else operator.index(item.start if whole else item)
        start = first + size if first < 0 else first
        last = operator.index((size if item.stop is None else item.stop) if whole else start + 1)
        stop = last + size if last < 0 else last
    except Exception:  # no index, or an __index__ that fails
        raise MaskError(f"index {shown(item)} of {axis}: give a whole number or a slice of step 1") from None
    if not 0 <= start < stop <= size:
        raise MaskError(f"index {shown(item)} of {axis} is empty or out of range; the mask has {size}")
    return start, stop


def per_head(heads: Any, blocks: Array) -> Array:
    """A choice of heads as bool ``[batch or 1, heads, 1, 1]``, where `blocks` is."""
    try:
        heads = moved(np.asarray(heads) if isinstance(heads, list | tuple) else heads, blocks)
    except Exception as error:  # no array, or one without values
        raise MaskError(f"heads is a {type(heads).__name__} ({str(error)[:200]}); give a bool array") from error
    xp, shape = grid_namespace(blocks), tuple(blocks.shape[:2])
    if heads.dtype != xp.bool or tuple(heads.shape) not in (shape[1:], shape):
        raise MaskError(
            f"heads is {heads.dtype} {tuple(heads.shape)}; give bool of shape {shape[1:]} or {shape} (batch, heads)"
        )
    return xp.reshape(heads, (-1, shape[1], 1, 1))


def block_of_token(layout: TokenLayout | None, length: int, block: int) -> np.ndarray:
    """The block of every token of a side, in the caller's order if `layout` has this side's tokens."""
    blocks = np.arange(length) // block
    inverse = layout.inverse if layout is not None and layout.length == length else None
    return blocks if inverse is None else blocks[inverse]


def first_tokens(layout: TokenLayout | None, length: int, block: int) -> np.ndarray:
    """The first token of every block of a side."""
    order = layout.order if layout is not None and layout.length == length else None
    return np.arange(0, length, block) if order is None else order[::block].copy()
