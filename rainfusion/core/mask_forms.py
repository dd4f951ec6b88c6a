"""The grid of a block mask in other forms: lists of key blocks, and eight blocks to a byte. Functions of arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import device as device_of

from rainfusion.core.arrays import Array, namespace
from rainfusion.core.errors import MaskError

# The most entries (bytes) that a grid made from a shorter form may have: a few numbers could ask for all memory.
MOST_ENTRIES = 2**33
MOST_COLUMNS = 2**24

# Entries of the grid that are made together from index lists; bounds the int64 arrays on the way.
_ENTRIES_AT_ONCE = 2**22


def grid_namespace(*arrays: Array) -> Any:
    """The array-API namespace of `arrays`, or a MaskError where they have none in common."""
    try:
        return namespace(*arrays)
    except Exception as error:
        said = str(error)[:200]
        raise MaskError(f"not an array of a library that array-api-compat knows: {said}") from None


def refuse_huge(shape: tuple[int, ...]) -> None:
    """Raise MaskError if a bool array of `shape` is larger than MOST_ENTRIES, before memory is taken for it."""
    entries = math.prod(shape)
    if entries > MOST_ENTRIES:
        raise MaskError(
            f"a grid of {'x'.join(map(str, shape))} entries takes {entries} bytes; at most {MOST_ENTRIES} are allowed; "
            "use larger blocks, or fewer heads or tokens at a time"
        )


def to_index_lists(blocks: Array, counts: Array, width: int) -> Array:
    """The kept columns of every row of a grid, ascending: int32 ``[..., width]``, filled up with 0."""
    xp = grid_namespace(blocks)
    kept_first = xp.argsort(xp.astype(~blocks, xp.uint8), axis=-1, stable=True)[..., :width]
    used = xp.arange(width, device=device_of(blocks)) < counts[..., None]
    return xp.astype(xp.where(used, kept_first, xp.zeros_like(kept_first)), xp.int32)


def from_index_lists(counts: Array, indices: Array, columns: int) -> Array:
    """The grid, bool ``[..., columns]``, that keeps the first ``counts[...]`` of ``indices[..., :]`` in every row.

    Raises:
        MaskError: a count or a used index out of range, or an index twice in a row.
    """
    xp = grid_namespace(counts, indices)
    slots = indices.shape[-1]
    refuse_huge((*counts.shape, columns))
    if columns > MOST_COLUMNS:
        raise MaskError(
            f"{columns} key blocks a row take {16 * columns} bytes to compare with indices; at most {MOST_COLUMNS} are "
            "allowed, as in plans; use larger blocks"
        )
    # int64 first: not every library compares the narrow unsigned types, and a huge uint64 becomes negative.
    counts_of_row = xp.reshape(xp.astype(counts, xp.int64), (-1,))
    if xp.any((counts_of_row < 0) | (counts_of_row > slots)):
        raise MaskError(f"a count lies outside [0, {slots}], the {slots} slots of a row")
    if slots == 0:
        return xp.zeros((*counts.shape, columns), dtype=xp.bool, device=device_of(counts))
    slots_of_row = xp.reshape(indices, (-1, slots))
    step = max(1, _ENTRIES_AT_ONCE // (columns + slots))
    parts = [
        _rows_of_lists(counts_of_row[i : i + step], xp.astype(slots_of_row[i : i + step], xp.int64), columns)
        for i in range(0, counts_of_row.shape[0], step)
    ]
    return xp.reshape(xp.concat(parts, axis=0), (*counts.shape, columns))


def _rows_of_lists(counts: Array, indices: Array, columns: int) -> Array:
    """Rows of the grid, bool ``[rows, columns]``, by bisection: no scatter, which the array API does not have."""
    xp = grid_namespace(indices)
    device = device_of(indices)
    rows, slots = indices.shape
    used = xp.arange(slots, device=device) < counts[:, None]
    if xp.any(used & ((indices < 0) | (indices >= columns))):
        raise MaskError(f"an index lies outside [0, {columns}), the key blocks of a row")
    # Unused slots sort behind every column.
    keys = xp.sort(xp.where(used, indices, xp.full_like(indices, columns)), axis=-1)
    if xp.any((keys[:, 1:] == keys[:, :-1]) & (keys[:, 1:] < columns)):
        raise MaskError("a row names a key block twice; give every block once")
    first = xp.arange(rows, dtype=xp.int64, device=device)[:, None] * (columns + 1)
    ascending = xp.reshape(keys + first, (-1,))
    wanted = xp.reshape(first + xp.arange(columns, dtype=xp.int64, device=device), (-1,))
    at = xp.clip(xp.searchsorted(ascending, wanted), 0, rows * slots - 1)
    return xp.reshape(xp.take(ascending, at, axis=0) == wanted, (rows, columns))


def pack(blocks: Array) -> Array:
    """Eight columns of a grid to a byte, lowest bit first: uint8 ``[..., ceil(columns / 8)]`` where the grid is."""
    xp = grid_namespace(blocks)
    *rows, columns = blocks.shape
    ones = xp.astype(blocks, xp.uint8)
    if columns % 8:
        tail = xp.zeros((*rows, -columns % 8), dtype=xp.uint8, device=device_of(blocks))
        ones = xp.concat((ones, tail), axis=-1)
    eights = xp.reshape(ones, (*rows, -(-columns // 8), 8))
    return xp.sum(eights * _bit_values(xp, device_of(blocks)), axis=-1, dtype=xp.uint8)


def unpack(bits: Array, columns: int) -> Array:
    """The grid, bool ``[..., columns]``, of what `pack` gave; bits beyond the last column are not looked at."""
    xp = grid_namespace(bits)
    grid = (bits[..., None] & _bit_values(xp, device_of(bits))) != 0
    return xp.reshape(grid, (*bits.shape[:-1], bits.shape[-1] * 8))[..., :columns]


def unpack_on_host(bits: np.ndarray, columns: int) -> np.ndarray:
    """As `unpack`, for NumPy arrays from outside.

    Raises:
        MaskError: bits set beyond the last column.
    """
    if columns % 8 and (bits[..., -1] >> columns % 8).any():
        raise MaskError(f"bits beyond key block {columns - 1} are set; the mask was packed for another length")
    return np.unpackbits(bits, axis=-1, count=columns, bitorder="little").view(bool)


def _bit_values(xp: Any, device: Any) -> Array:
    """uint8 1, 2, 4, ... 128, computed on the device: a list would be copied there, and the host would wait."""
    return xp.bitwise_left_shift(xp.ones(8, dtype=xp.uint8, device=device), xp.arange(8, dtype=xp.uint8, device=device))
