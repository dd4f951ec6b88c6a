"""BlockMask: which key blocks each query block attends to.

The mask lives in the block order of the plan that selected it, in whatever array library and on whatever
device its boolean grid lives (anything array-api-compat knows: NumPy, torch, CuPy, ...).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from array_api_compat import device as device_of
from array_api_compat import is_numpy_array, to_device

from rainfusion.core import mask_file, mask_forms
from rainfusion.core.arrays import Array, library_name, moved, to_numpy
from rainfusion.core.checks import as_int, shown
from rainfusion.core.errors import MaskError
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask_forms import grid_namespace
from rainfusion.core.mask_sizes import block_of_token, checked_sizes, first_tokens, grid_of, index_ranges, per_head

# What libraries raise about a device that they do not have. Subclasses (out of memory) are about something else.
_DEVICE_ERRORS = (AssertionError, RuntimeError, TypeError, ValueError)


class LayoutLater(Protocol):
    """The layout of a mask that was made while a tracer held its sizes: worked out when it is asked for."""

    def __call__(self) -> TokenLayout:
        """The layout."""

    def is_traced(self) -> bool:
        """Whether a tracer still holds the sizes."""


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A boolean grid over (query block, key block), True where attention is computed.

    Any grid of the right shape is a mask. A query block that keeps no key block has output 0 and
    log-sum-exp minus infinity.

    Args:
        blocks: bool ``[batch, heads, q blocks, key blocks]``, heads being query heads.
        q_len, kv_len: tokens on either side; the last block of a side may be ragged.
        block: tokens in a query block and in a key block.
        layout: the layout in whose order the blocks are; None where that is not known, so that only
            sizes can be compared with those of a plan.

    Raises:
        MaskError: a shape that does not match the lengths, another dtype than bool, or a layout with
            other blocks.
    """

    blocks: Array
    q_len: int
    kv_len: int
    block: tuple[int, int]
    layout: TokenLayout | None = field(default_factory=lambda: None, repr=False)  # no attribute of the class

    __iter__: ClassVar[None] = None  # or Python would iterate by mask[0], mask[1], ...
    _later: ClassVar[Any] = None  # an instance's LayoutLater, in place of `layout`

    def __post_init__(self) -> None:
        _set_checked(self, self.blocks, "blocks", "bool", columns_of_a_byte=1)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The layout of a mask that has it later: worked out when it is asked for."""
            if name == "layout" and self._later is not None:
                return self._later()
            raise AttributeError(f"a BlockMask has no attribute {name!r}")

    @classmethod
    def _trusted(
        cls, blocks: Array, q_len: int, kv_len: int, block: tuple[int, int], layout: TokenLayout | None = None
    ) -> BlockMask:
        """A mask from parts that are known to match: no check, no look at the arrays."""
        mask = object.__new__(cls)
        mask.__dict__.update(blocks=blocks, q_len=q_len, kv_len=kv_len, block=block, layout=layout)
        return mask

    def _with(self, blocks: Array) -> BlockMask:
        """Other content of the same shape."""
        if self._later is not None:
            return self._trusted_later(blocks, self.q_len, self.kv_len, self.block, self._later)
        return self._trusted(blocks, self.q_len, self.kv_len, self.block, self.layout)

    @staticmethod
    def _trusted_later(blocks: Array, q_len: int, kv_len: int, block: tuple[int, int], later: LayoutLater) -> BlockMask:
        """As `_trusted`, with a function that gives the layout: for tracers, to which sizes are symbols."""
        mask = object.__new__(BlockMask)
        mask.__dict__.update(blocks=blocks, q_len=q_len, kv_len=kv_len, block=block, _later=later)
        return mask

    # -- what it says ------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Exact share of block pairs that are attended, over all batches and heads. Waits for the device."""
        xp = grid_namespace(self.blocks)
        pairs: int = math.prod(self.blocks.shape)
        return int(xp.sum(self.blocks, dtype=xp.int64)) / pairs

    @property
    def sparsity(self) -> float:
        """Exact share of block pairs that are skipped: ``1 - density``. Waits for the device."""
        return 1.0 - self.density

    @property
    def counts(self) -> Array:
        """Kept key blocks of every query block, int32 ``[batch, heads, q blocks]``."""
        xp = grid_namespace(self.blocks)
        return xp.sum(self.blocks, axis=-1, dtype=xp.int32)

    # -- parts and combinations --------------------------------------------------------------------

    def __getitem__(self, items: Any) -> BlockMask:
        """The mask of a range of batches, heads, query blocks and key blocks: ``mask[b, h, rows, columns]``.

        Every index is a whole number or a slice of step 1; left out ones (also by ``...``) mean all. The
        result keeps its four axes. Ranges of query and key blocks cut `q_len` and `kv_len` accordingly,
        and keep `layout` only if both are whole.

        Raises:
            MaskError: an index of another kind, or a range that is empty or beyond the mask.
        """
        ranges = index_ranges(items, tuple(self.blocks.shape))
        q_len, kv_len = (
            min(stop * block, length) - start * block
            for (start, stop), block, length in zip(ranges[2:], self.block, (self.q_len, self.kv_len), strict=True)
        )
        blocks = self.blocks[tuple([slice(*r) for r in ranges])]
        if (q_len, kv_len) == (self.q_len, self.kv_len):
            return self._with(blocks)
        return self._trusted(blocks, q_len, kv_len, self.block)

    @staticmethod
    def where(heads: Array, a: BlockMask, b: BlockMask) -> BlockMask:
        """The mask that is `a` in the heads where `heads` is True, and `b` in the others.

        Args:
            heads: bool ``[heads]`` or ``[batch, heads]``, of any library; nothing waits for the device
                if it is where the masks are.
            a, b: masks of one problem, in one library and on one device. Where only one of them knows
                its layout, the result has that one. (While torch.compile traces, layouts are not compared.)

        Raises:
            MaskError: masks of other sizes, layouts, libraries or devices, or another shape or dtype of `heads`.
        """
        _refuse_unlike(a, b)
        xp = grid_namespace(a.blocks)
        chosen = xp.where(per_head(heads, a.blocks), a.blocks, b.blocks)
        return (b if not _is_traced(a) and a.layout is None else a)._with(chosen)

    def to(self, device: Any) -> BlockMask:
        """The same mask on another device of its library, itself if it is there already.

        Args:
            device: what the library takes, such as ``"cuda:0"`` or a torch.device; ``"cpu"`` for NumPy.

        Raises:
            MaskError: a device that the library does not have.
        """
        try:
            blocks = to_device(self.blocks, device)
            if blocks.dtype != self.blocks.dtype:  # torch's `to` takes dtypes and numbers too
                raise TypeError("not a device")
        except _DEVICE_ERRORS as error:
            if type(error) not in _DEVICE_ERRORS:
                raise
            raise MaskError(
                f"a mask of {library_name(self.blocks)} cannot move to device {shown(device)} ({str(error)[:120]}); "
                "name a device of that library, or use mask.like(array) to move to another library"
            ) from error
        return self if blocks is self.blocks else self._with(blocks)

    def like(self, array: Array) -> BlockMask:
        """The same mask in the library and on the device of `array`, itself if it is there already.

        Raises:
            MaskError: not an array of a library that array-api-compat knows.
        """
        grid_namespace(array)
        blocks = moved(self.blocks, array)
        return self if blocks is self.blocks else self._with(blocks)

    # -- other forms -------------------------------------------------------------------------------

    @classmethod
    def from_bool(
        cls, blocks: Array, q_len: int, kv_len: int, block: tuple[int, int], layout: TokenLayout | None = None
    ) -> BlockMask:
        """The mask of a boolean grid; the same as the constructor."""
        return cls(blocks, q_len, kv_len, block, layout)

    def to_kv_indices(self, width: int | None = None) -> tuple[Array, Array]:
        """Kept key blocks as index lists.

        Args:
            width: slots of a row (default: the largest count, at least 1, for which the host waits for
                the device; with the number of key blocks it never waits).

        Returns:
            ``(counts, indices)``: int32 ``[batch, heads, q blocks]`` and int32 ``[..., width]``,
            ascending, the slots beyond the count filled with 0.

        Raises:
            MaskError: `width` does not hold the longest row, or exceeds the number of key blocks.
        """
        xp = grid_namespace(self.blocks)
        counts, columns = self.counts, self.blocks.shape[-1]
        width = max(1, int(xp.max(counts))) if width is None else as_int(width, "width", MaskError)
        if width > columns or (width < columns and width < int(xp.max(counts))):
            raise MaskError(
                f"width={width} does not fit; give at least {int(xp.max(counts))}, the longest row, and at most "
                f"{columns}, the number of key blocks"
            )
        return counts, mask_forms.to_index_lists(self.blocks, counts, width)

    @classmethod
    def from_kv_indices(
        cls,
        counts: Array,
        indices: Array,
        q_len: int,
        kv_len: int,
        block: tuple[int, int],
        layout: TokenLayout | None = None,
    ) -> BlockMask:
        """The mask whose row (b, h, i) keeps ``indices[b, h, i, :counts[b, h, i]]``; order does not matter.

        Args:
            counts: integers of any width, ``[batch, heads, q blocks]``; 0 keeps nothing.
            indices: integers of any width, ``[batch, heads, q blocks, slots]``.

        Raises:
            MaskError: a count or an index out of range, an index named twice in a row, other shapes or
                dtypes, or a grid of more than 2**33 entries.
        """
        xp = grid_namespace(counts, indices)
        q_len, kv_len, block = checked_sizes(q_len, kv_len, block)
        if not all(xp.isdtype(x.dtype, "integral") for x in (counts, indices)):
            raise MaskError(f"counts is {counts.dtype} and indices {indices.dtype}; give integers")
        rows, columns = grid_of(q_len, kv_len, block)
        shape = tuple(counts.shape)
        if tuple(indices.shape[:-1]) != shape or len(shape) != 3 or 0 in shape or shape[2] != rows:
            raise MaskError(
                f"counts has shape {shape} and indices {tuple(indices.shape)}; {q_len} query tokens in blocks of "
                f"{block[0]} need (batch, heads, {rows}) and (batch, heads, {rows}, slots)"
            )
        return cls(mask_forms.from_index_lists(counts, indices, columns), q_len, kv_len, block, layout)

    def packed(self) -> PackedMask:
        """The mask with eight blocks to a byte, on its device; nothing waits for the device."""
        return PackedMask._trusted(mask_forms.pack(self.blocks), self.q_len, self.kv_len, self.block, self.layout)

    def to_bits(self) -> np.ndarray:
        """The grid packed eight blocks a byte, lowest bit first: uint8 ``[..., ceil(key blocks / 8)]`` on the host."""
        return np.packbits(to_numpy(self.blocks), axis=-1, bitorder="little")

    @classmethod
    def from_bits(
        cls, bits: np.ndarray, q_len: int, kv_len: int, block: tuple[int, int], layout: TokenLayout | None = None
    ) -> BlockMask:
        """The mask (on NumPy) from what `to_bits` gave.

        Raises:
            MaskError: wrong shape or dtype, or bits set beyond the last key block.
        """
        if not isinstance(bits, np.ndarray):
            raise MaskError(f"bits is a {type(bits).__name__}; give a NumPy array of uint8")
        packed = PackedMask(bits, q_len, kv_len, block, layout)
        _, columns = grid_of(packed.q_len, packed.kv_len, packed.block)
        blocks = mask_forms.unpack_on_host(bits, columns)
        return cls(blocks, packed.q_len, packed.kv_len, packed.block, layout)

    def to_dense(self, layout: TokenLayout | None = None) -> Array:
        """The mask token by token, bool ``[batch, heads, q_len, kv_len]``: for looking at small cases.

        Args:
            layout: give the plan's layout to have rows and columns in the caller's token order;
                without it they are in block order.

        Raises:
            MaskError: `layout` is no TokenLayout, or the result has more than 2**33 entries.
        """
        _check_layout(layout)
        xp = grid_namespace(self.blocks)
        mask_forms.refuse_huge((*self.blocks.shape[:2], self.q_len, self.kv_len))
        rows, columns = (
            xp.asarray(block_of_token(layout, length, block), device=device_of(self.blocks))
            for length, block in zip((self.q_len, self.kv_len), self.block, strict=True)
        )
        return xp.take(xp.take(self.blocks, rows, axis=2), columns, axis=3)

    @classmethod
    def from_dense(cls, dense: Array, block: tuple[int, int], layout: TokenLayout | None = None) -> BlockMask:
        """The mask of a token-level one that is constant over every block.

        Args:
            dense: bool ``[batch, heads, q_len, kv_len]``.
            layout: as in `to_dense`; the mask is then one of this layout.

        Raises:
            MaskError: a block that is attended in part, another shape or dtype, or a layout with other blocks.
        """
        _check_layout(layout)
        xp = grid_namespace(dense)
        if dense.ndim != 4:
            raise MaskError(f"dense has shape {tuple(dense.shape)}; give [batch, heads, q_len, kv_len]")
        q_len, kv_len, block = checked_sizes(dense.shape[2], dense.shape[3], block)
        rows, columns = (
            xp.asarray(first_tokens(layout, length, size), device=device_of(dense))
            for length, size in ((q_len, block[0]), (kv_len, block[1]))
        )
        mask = cls(xp.take(xp.take(dense, rows, axis=2), columns, axis=3), q_len, kv_len, block, layout)
        if not xp.all(mask.to_dense(layout) == dense):
            raise MaskError(f"dense attends blocks of {block} in part; a block mask keeps or skips whole blocks")
        return mask

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the mask and its layout to an ``.npz`` file: packed bits and a JSON header, no pickle.

        Raises:
            MaskError: not a path, or more than 2**31 block pairs.
        """
        mask_file.write(path, self.to_bits(), self.q_len, self.kv_len, self.block, self.layout)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> BlockMask:
        """Read a mask written by `save`, on NumPy. Never unpickles; every value is checked.

        Raises:
            MaskError: not such a file (pipes and devices included), another version, or content that is
                not a valid mask.
            OSError: no such file, or one that may not be read.
        """
        return mask_file.read(path, cls.from_bits)

    def __repr__(self) -> str:
        b, h, tq, tk = self.blocks.shape
        return (
            f"BlockMask(batch={b}, heads={h}, blocks={tq}x{tk} of {self.block[0]}x{self.block[1]}, "
            f"tokens={self.q_len}x{self.kv_len}{_density_on_host(self)})"
        )


@dataclass(frozen=True, eq=False)
class PackedMask:
    """A block mask with eight key blocks to a byte, to keep many of them on a device.

    Args:
        bits: uint8 ``[batch, heads, q blocks, ceil(key blocks / 8)]``, lowest bit first; bits beyond the
            last key block are not looked at.
        q_len, kv_len, block, layout: as in `BlockMask`.

    Raises:
        MaskError: a shape that does not match the lengths, another dtype, or a layout with other blocks.
    """

    bits: Array
    q_len: int
    kv_len: int
    block: tuple[int, int]
    layout: TokenLayout | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _set_checked(self, self.bits, "bits", "uint8", columns_of_a_byte=8)

    @classmethod
    def _trusted(
        cls, bits: Array, q_len: int, kv_len: int, block: tuple[int, int], layout: TokenLayout | None
    ) -> PackedMask:
        packed = object.__new__(cls)
        packed.__dict__.update(bits=bits, q_len=q_len, kv_len=kv_len, block=block, layout=layout)
        return packed

    def unpacked(self) -> BlockMask:
        """The mask, on the device of the bits; nothing waits for the device."""
        _, columns = grid_of(self.q_len, self.kv_len, self.block)
        blocks = mask_forms.unpack(self.bits, columns)
        return BlockMask._trusted(blocks, self.q_len, self.kv_len, self.block, self.layout)

    def __repr__(self) -> str:
        b, h = self.bits.shape[:2]
        return f"PackedMask(batch={b}, heads={h}, tokens={self.q_len}x{self.kv_len} in blocks of {self.block})"


def _set_checked(mask: BlockMask | PackedMask, grid: Array, name: str, dtype: str, columns_of_a_byte: int) -> None:
    """Check the parts of a mask and set its sizes as plain ints."""
    xp = grid_namespace(grid)
    if grid.dtype != getattr(xp, dtype):
        raise MaskError(f"{name} has dtype {grid.dtype}; give {dtype}, set where attention is computed")
    q_len, kv_len, block = checked_sizes(mask.q_len, mask.kv_len, mask.block)
    rows, columns = grid_of(q_len, kv_len, block)
    shape, needed = tuple(grid.shape), (rows, -(-columns // columns_of_a_byte))
    if len(shape) != 4 or shape[2:] != needed or 0 in shape:
        raise MaskError(
            f"{name} has shape {shape}; {q_len}x{kv_len} tokens in blocks of {block} need "
            f"(batch, heads, {needed[0]}, {needed[1]})"
        )
    _check_layout(mask.layout)
    if mask.layout is not None and mask.layout.block != block:
        raise MaskError(f"the layout has blocks of {mask.layout.block} and the mask of {block}; give one size")
    for field_name, value in (("q_len", q_len), ("kv_len", kv_len), ("block", block)):
        object.__setattr__(mask, field_name, value)


def _check_layout(layout: Any) -> None:
    if layout is not None and not isinstance(layout, TokenLayout):
        raise MaskError(f"layout={shown(layout)} is not a layout; give a TokenLayout or leave it out")


def _refuse_unlike(a: BlockMask, b: BlockMask) -> None:
    """Two masks to choose between describe one problem and are in one place."""
    for mask in (a, b):
        if not isinstance(mask, BlockMask):
            raise MaskError(f"a and b must be masks; one is a {type(mask).__name__}: give two BlockMasks")
    sizes = [(tuple(m.blocks.shape), m.q_len, m.kv_len, m.block) for m in (a, b)]
    if sizes[0] != sizes[1]:
        raise MaskError(f"the masks are {a!r} and {b!r}; give two masks of one problem")
    traced = _is_traced(a) or _is_traced(b)
    if not traced and None not in (a.layout, b.layout) and a.layout != b.layout:
        raise MaskError(f"the masks have the layouts {a.layout!r} and {b.layout!r}; give two masks of one layout")
    places = [f"{library_name(m.blocks)} on {device_of(m.blocks)}" for m in (a, b)]
    if places[0] != places[1]:
        raise MaskError(f"the masks are {places[0]} and {places[1]}; move one with a.like(b.blocks)")


def _is_traced(mask: BlockMask) -> bool:
    return mask._later is not None and mask._later.is_traced()


def _density_on_host(mask: BlockMask) -> str:
    """The density as text, where reading it waits for no device."""
    if not is_numpy_array(mask.blocks) and str(device_of(mask.blocks)) != "cpu":
        return ""
    try:
        return f", density={mask.density:.4f}"
    except Exception:  # an array that a compiler traces has no values; each library says so in its own way
        return ""
