"""BlockMask: which key blocks each query block attends to, and its other written forms.

The mask lives in the block order of the plan that made it, in whatever array library and on whatever
device its boolean grid lives (anything array-api-compat knows: NumPy, torch, CuPy, ...).
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as device_of

from rainfusion.core.checks import as_int
from rainfusion.core.errors import MaskError
from rainfusion.core.layout import TokenLayout

Array = Any
_FILE_VERSION = 1

# The most a mask file may unpack to; a file is compressed, so its own size bounds nothing. 2**28 bytes are
# 2**31 block pairs: 64 heads of 700 000 tokens in blocks of 128.
_MOST_FILE_BYTES = {"header": 2**12, "bits": 2**28}


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A boolean grid over (query block, key block), True where attention is computed.

    Args:
        blocks: bool ``[batch, heads, q blocks, key blocks]``, heads being query heads.
        q_len, kv_len: tokens on either side; the last block of a side may be ragged.
        block: tokens in a query block and in a key block.
        layout: the layout in whose order the blocks are, in masks that a plan made; None where that is
            not known (made elsewhere, read from a file), so that only sizes can be compared.

    Only shapes are looked at; `checked`, the ``from_`` methods and the call that attends by it look at the content too.

    Raises:
        MaskError: a shape that does not match the lengths, or another dtype than bool.
    """

    blocks: Array
    q_len: int
    kv_len: int
    block: tuple[int, int]
    layout: TokenLayout | None = field(default=None, repr=False)
    _is_sound: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        xp = _namespace(self.blocks)
        if self.blocks.dtype != xp.bool:
            raise MaskError(f"blocks has dtype {self.blocks.dtype}; give booleans, True where attention is computed")
        q_len, kv_len, block = _checked_sizes(self.q_len, self.kv_len, self.block)
        for name, value in (("q_len", q_len), ("kv_len", kv_len), ("block", block)):
            object.__setattr__(self, name, value)
        shape, grid = tuple(self.blocks.shape), (-(-q_len // block[0]), -(-kv_len // block[1]))
        if len(shape) != 4 or shape[2:] != grid or 0 in shape:
            raise MaskError(
                f"blocks has shape {shape}; {q_len}x{kv_len} tokens in blocks of {block} need "
                f"(batch, heads, {grid[0]}, {grid[1]})"
            )

    # -- what it says ------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Exact share of block pairs that are attended, over all batches and heads."""
        xp = _namespace(self.blocks)
        pairs: int = math.prod(self.blocks.shape)
        return int(xp.sum(self.blocks, dtype=xp.int64)) / pairs

    @property
    def sparsity(self) -> float:
        """Exact share of block pairs that are skipped: ``1 - density``."""
        return 1.0 - self.density

    @property
    def counts(self) -> Array:
        """Kept key blocks of every query block, int32 ``[batch, heads, q blocks]``."""
        xp = _namespace(self.blocks)
        return xp.sum(self.blocks, axis=-1, dtype=xp.int32)

    def checked(self) -> BlockMask:
        """This mask, after a look at its content: every row keeps at least one block (Law 4).

        The first look waits for the device; a mask that passed is not looked at again.

        Raises:
            MaskError: naming the first empty row.
        """
        if not self._is_sound:
            self._refuse_empty_rows()
            object.__setattr__(self, "_is_sound", True)
        return self

    @property
    def is_sound(self) -> bool:
        """Whether its content was looked at, or vouched for by a plan that made it."""
        return self._is_sound

    def vouched(self) -> BlockMask:
        """This mask, its content vouched for by who made it: nobody will wait for the device to look at it."""
        object.__setattr__(self, "_is_sound", True)
        return self

    def _refuse_empty_rows(self) -> None:
        empty = np.argwhere(to_numpy(self.counts) == 0)
        if len(empty):
            batch, head, row = (int(i) for i in empty[0])
            raise MaskError(
                f"{len(empty)} query block(s) keep no key block, the first at batch {batch}, head {head}, row {row}; "
                "every row keeps at least one, its softmax has no value otherwise"
            )

    def like(self, array: Array) -> BlockMask:
        """The same mask in the library and on the device of `array` (an explicit copy where they differ)."""
        xp = _namespace(array)
        if xp is _namespace(self.blocks) and device_of(self.blocks) == device_of(array):
            return self
        return replace(self, blocks=xp.asarray(to_numpy(self.blocks).copy(), device=device_of(array)))

    # -- other forms -------------------------------------------------------------------------------

    def to_bool(self) -> Array:
        """The boolean grid, ``[batch, heads, q blocks, key blocks]``."""
        return self.blocks

    @classmethod
    def from_bool(cls, blocks: Array, q_len: int, kv_len: int, block: tuple[int, int]) -> BlockMask:
        """A checked mask from a boolean grid.

        Raises:
            MaskError: wrong shape or dtype, or a row that keeps nothing.
        """
        return cls(blocks, q_len, kv_len, block).checked()

    def to_kv_indices(self, width: int | None = None) -> tuple[Array, Array]:
        """Kept key blocks as index lists.

        Args:
            width: slots a row (default: the largest count, which reads it back from the device; the
                number of key blocks never needs to).

        Returns:
            ``(counts, indices)``: int32 ``[batch, heads, q blocks]`` and int32 ``[..., width]``,
            ascending, the slots beyond the count filled with 0.

        Raises:
            MaskError: `width` does not hold the longest row, or exceeds the number of key blocks.
        """
        xp = _namespace(self.blocks)
        counts, columns = self.counts, self.blocks.shape[-1]
        width = int(xp.max(counts)) if width is None else as_int(width, "width", MaskError)
        if width > columns or (width < columns and width < int(xp.max(counts))):
            raise MaskError(
                f"width={width} does not fit; give at least {int(xp.max(counts))}, the longest row, and at most "
                f"{columns}, the number of key blocks"
            )
        kept_first = xp.argsort(xp.astype(~self.blocks, xp.uint8), axis=-1, stable=True)[..., :width]
        slots = xp.arange(width, device=device_of(self.blocks))
        used = slots < counts[..., None]
        return counts, xp.astype(xp.where(used, kept_first, xp.zeros_like(kept_first)), xp.int32)

    @classmethod
    def from_kv_indices(
        cls, counts: Array, indices: Array, q_len: int, kv_len: int, block: tuple[int, int]
    ) -> BlockMask:
        """The mask whose row (b, h, i) keeps ``indices[b, h, i, :counts[b, h, i]]``; order does not matter.

        Raises:
            MaskError: a count or an index out of range, an index named twice in a row, an empty row.
        """
        xp = _namespace(counts, indices)
        q_len, kv_len, block = _checked_sizes(q_len, kv_len, block)
        if not all(xp.isdtype(x.dtype, "integral") for x in (counts, indices)):
            raise MaskError(f"counts is {counts.dtype} and indices {indices.dtype}; give integers")
        if tuple(indices.shape[:-1]) != tuple(counts.shape) or counts.ndim != 3 or 0 in indices.shape:
            raise MaskError(
                f"counts {tuple(counts.shape)} and indices {tuple(indices.shape)} do not match; give "
                "[batch, heads, q blocks] and [batch, heads, q blocks, slots]"
            )
        n, slots = -(-kv_len // block[1]), indices.shape[-1]
        if xp.any(counts < 1) or xp.any(counts > slots):
            raise MaskError(f"a count lies outside [1, {slots}]: every row keeps a block, and has {slots} slots")
        used = xp.arange(slots, device=device_of(indices)) < counts[..., None]
        if xp.any(used & ((indices < 0) | (indices >= n))):
            raise MaskError(
                f"an index lies outside [0, {n}), the key blocks of {kv_len} tokens in blocks of {block[1]}"
            )
        # Unused slots sort behind every block; each block is then found by bisection: no scatter, no loop.
        keys = xp.sort(xp.where(used, xp.astype(indices, xp.int64), xp.asarray(n, device=device_of(indices))), axis=-1)
        if xp.any((keys[..., 1:] == keys[..., :-1]) & (keys[..., 1:] < n)):
            raise MaskError("a row names a key block twice; give every block once")
        rows = counts.shape[0] * counts.shape[1] * counts.shape[2]
        base = xp.arange(rows, device=device_of(indices))[:, None] * (n + 1)
        flat = xp.reshape(xp.reshape(keys, (rows, slots)) + base, (-1,))
        wanted = xp.reshape(base + xp.arange(n, device=device_of(indices)), (-1,))
        at = xp.searchsorted(flat, wanted)
        hit = xp.take(flat, xp.clip(at, 0, flat.shape[0] - 1), axis=0) == wanted
        return cls(xp.reshape(hit, (*counts.shape, n)), q_len, kv_len, block).checked()

    def to_bits(self) -> np.ndarray:
        """The grid packed eight blocks a byte, lowest bit first: uint8 ``[..., ceil(key blocks / 8)]`` on the host."""
        return np.packbits(to_numpy(self.blocks), axis=-1, bitorder="little")

    @classmethod
    def from_bits(cls, bits: np.ndarray, q_len: int, kv_len: int, block: tuple[int, int]) -> BlockMask:
        """The mask (on NumPy) from packed bits.

        Raises:
            MaskError: wrong shape or dtype, bits set beyond the last key block, an empty row.
        """
        q_len, kv_len, block = _checked_sizes(q_len, kv_len, block)
        n = -(-kv_len // block[1])
        needed = (-(-q_len // block[0]), -(-n // 8))
        if not isinstance(bits, np.ndarray) or bits.dtype != np.uint8 or bits.ndim != 4 or bits.shape[2:] != needed:
            given = f"{bits.dtype} {bits.shape}" if isinstance(bits, np.ndarray) else f"a {type(bits).__name__}"
            raise MaskError(f"bits is {given}; give NumPy uint8 [batch, heads, {needed[0]}, {needed[1]}]")
        unpacked = np.unpackbits(bits, axis=-1, bitorder="little").astype(bool)
        if unpacked[..., n:].any():
            raise MaskError(f"bits beyond key block {n - 1} are set; the mask was packed for another length")
        return cls.from_bool(unpacked[..., :n], q_len, kv_len, block)

    def to_dense(self, layout: TokenLayout | None = None) -> Array:
        """The mask token by token, bool ``[batch, heads, q_len, kv_len]``: for looking at small cases.

        Args:
            layout: give the plan's layout to have rows and columns in the caller's token order;
                without it they are in block order.
        """
        xp = _namespace(self.blocks)
        device = device_of(self.blocks)
        rows, columns = (xp.asarray(self._block_of_token(layout, side), device=device) for side in (0, 1))
        return xp.take(xp.take(self.blocks, rows, axis=2), columns, axis=3)

    @classmethod
    def from_dense(cls, dense: Array, block: tuple[int, int], layout: TokenLayout | None = None) -> BlockMask:
        """The mask of a token-level one that is constant over every block.

        Args:
            dense: bool ``[batch, heads, q_len, kv_len]``.
            layout: as in `to_dense`.

        Raises:
            MaskError: a block that is attended in part, or an empty row.
        """
        xp = _namespace(dense)
        if dense.ndim != 4:
            raise MaskError(f"dense has shape {tuple(dense.shape)}; give [batch, heads, q_len, kv_len]")
        q_len, kv_len, block = _checked_sizes(dense.shape[2], dense.shape[3], block)
        device = device_of(dense)
        firsts = (
            xp.asarray(_ordered_positions(layout, n)[::b].copy(), device=device)
            for n, b in ((q_len, block[0]), (kv_len, block[1]))
        )
        rows, columns = firsts
        mask = cls(xp.take(xp.take(dense, rows, axis=2), columns, axis=3), q_len, kv_len, block)
        if not xp.all(mask.to_dense(layout) == dense):
            raise MaskError(f"dense attends blocks of {block} in part; a block mask keeps or skips whole blocks")
        return mask.checked()

    def _block_of_token(self, layout: TokenLayout | None, side: int) -> np.ndarray:
        length = (self.q_len, self.kv_len)[side]
        blocks = np.arange(length) // self.block[side]
        return blocks if layout is None or layout.length != length else blocks[layout.inverse]

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the mask to an ``.npz`` file: packed bits and a JSON header, no pickle."""
        header = {"version": _FILE_VERSION, "q_len": self.q_len, "kv_len": self.kv_len, "block": self.block}
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, header=text, bits=self.to_bits())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> BlockMask:
        """Read a mask written by `save`, on NumPy. Never unpickles; every value is checked.

        Raises:
            MaskError: not such a file, another version, or content that is not a valid mask.
        """
        with Path(path).open("rb") as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    header = json.loads(_member(archive, "header").tobytes())
                    if header["version"] != _FILE_VERSION:
                        raise MaskError(f"mask format {header['version']}; this rainfusion reads {_FILE_VERSION}")
                    block = tuple(header["block"])
                    return cls.from_bits(_member(archive, "bits"), header["q_len"], header["kv_len"], block)
            except Exception as error:  # zipfile, zlib and NumPy fail on a damaged file in ways none of them lists
                raise MaskError(
                    f"{path} is not a rainfusion block mask ({error}); write one with BlockMask.save"
                ) from error

    def __repr__(self) -> str:
        b, h, tq, tk = self.blocks.shape
        return (
            f"BlockMask(batch={b}, heads={h}, blocks={tq}x{tk} of {self.block[0]}x{self.block[1]}, "
            f"tokens={self.q_len}x{self.kv_len}, density={self.density:.4f})"
        )


def _checked_sizes(q_len: Any, kv_len: Any, block: Any) -> tuple[int, int, tuple[int, int]]:
    """Lengths and blocks as plain positive ints."""
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise MaskError(f"block={block!r} is not a pair; give (query block, key block)")
    q_block, kv_block = (as_int(size, "block", MaskError) for size in block)
    return as_int(q_len, "q_len", MaskError), as_int(kv_len, "kv_len", MaskError), (q_block, kv_block)


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One uint8 array of an npz file. Its size is checked before memory is taken, and nothing is unpickled."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > _MOST_FILE_BYTES[name]:
        raise MaskError(f"{name} unpacks to {info.file_size} bytes; at most {_MOST_FILE_BYTES[name]} are read")
    stream: IO[bytes] = io.BytesIO(archive.read(info))
    if np.lib.format.read_magic(stream) != (1, 0):
        raise MaskError(f"{name} has another array format than NumPy 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    data = stream.read()
    if dtype != np.uint8 or fortran or any(n < 0 for n in shape) or math.prod(shape) != len(data):
        raise MaskError(f"{name} is {dtype} {shape} in {len(data)} bytes; it must be uint8 in C order")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def to_numpy(x: Array) -> np.ndarray:
    """A host copy (or view) of an array of any library."""
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)


def _ordered_positions(layout: TokenLayout | None, length: int) -> np.ndarray:
    order = layout.order if layout is not None and layout.length == length else None
    return np.arange(length) if order is None else order


def _namespace(*arrays: Array) -> Any:
    try:
        return array_namespace(*arrays)
    except TypeError as error:
        raise MaskError(f"not an array of a library that array-api-compat knows: {error}") from None
