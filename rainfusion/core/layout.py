"""TokenLayout: how the tokens of a sequence are put into blocks of neighbours in space and time.

Whole windows fill whole blocks. Each grid is cut along each axis into a part that whole windows cover and a ragged
rest. The block order holds the whole windows of every grid, then the remainders of every grid, then tokens without a
grid, and the protected tokens last. It is one bijective index vector.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from array_api_compat import device as device_of

from rainfusion.core.arrays import Array, cannot, namespace, shape_of
from rainfusion.core.axis import BlockedAxis, ProtectedRange
from rainfusion.core.checks import LARGEST, as_int, as_sizes, one_of, shown
from rainfusion.core.errors import LayoutError
from rainfusion.core.parts import SINKS, Grid, Part, ProtectedRun, Sink, Text, Tokens, as_box, part_from_dict
from rainfusion.core.windows import Sizes, compact_window, fold, times

__all__ = [
    "SINKS",
    "TEXT_POSITIONS",
    "BlockedAxis",
    "Grid",
    "Part",
    "ProtectedRange",
    "Text",
    "TokenLayout",
    "Tokens",
    "compact_window",
    "times",
]

TEXT_POSITIONS = ("start", "end")

# Far above what models pack into a sequence; it bounds the work that a layout from a file can ask for.
_MOST_PARTS = 1024
_MOST_ORDERED = 2**28
_MOST_PARTS_SHOWN = 8


@dataclass(frozen=True, init=False)
class TokenLayout:
    """The place of every token of one sequence, and the block order made from it.

    Two layouts are equal if their parts and blocks are; the short form and the parts it stands for are the same.

    Args:
        grid: short form: (frames, height, width) in tokens of a sequence with one grid.
        text: short form: text tokens before or after the grid.
        text_position: short form: ``"start"`` or ``"end"``.
        window: (t, h, w) tokens folded together, for every grid without a window of its own; its volume is a
            multiple of both block sizes. Default: the most compact window of one block that fits into the grid
            without its sinks.
        block: tokens a block, or (query block, key block).
        sink: short form: protected frames of the grid, see `Grid`.
        parts: `Grid`, `Text` and `Tokens` in the order of the sequence, in place of the short form. Without grid
            and parts, tokens keep their order and none is protected, whatever the length.

    Attributes:
        parts: the parts in the order of the sequence; every grid has its window, and sinks only where it has
            frames for them.
        block: (query block, key block).

    Raises:
        LayoutError: sizes out of range, a window that does not fill whole blocks, both forms at once.
    """

    parts: tuple[Part, ...]
    block: tuple[int, int]

    def __init__(
        self,
        grid: Sizes | None = None,
        text: int = 0,
        text_position: str = "end",
        window: Sizes | None = None,
        block: int | tuple[int, int] = 128,
        sink: Sink = "first_frame",
        *,
        parts: Sequence[Part] | None = None,
    ) -> None:
        one_of(text_position, TEXT_POSITIONS, "text_position", LayoutError)
        if parts is None:
            given = _short_form(grid, text, text_position, sink)
        elif _is_default(grid, text, text_position, sink):
            given = _checked_parts(parts)
        else:
            raise LayoutError("parts take the place of grid, text, text_position and sink; give one form or the other")
        rows, columns = as_sizes(block if isinstance(block, tuple | list) else (block, block), 2, "block", LayoutError)
        object.__setattr__(self, "parts", _settled(given, (rows, columns), _checked_window(window, given)))
        object.__setattr__(self, "block", (rows, columns))

    @cached_property
    def _hashof_parts(self) -> int:
        return hash((self.parts, self.block))

    def __hash__(self) -> int:
        return self._hashof_parts

    def __reduce__(self) -> tuple[Any, ...]:
        return of_parts, (self.parts, self.block)

    # -- what there is -----------------------------------------------------------------------------

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids, in the order of the sequence."""
        return tuple(part for part in self.parts if isinstance(part, Grid))

    @property
    def grid(self) -> Sizes | None:
        """(frames, height, width) of the only grid; None where there is none, or several."""
        return self.grids[0].sizes if len(self.grids) == 1 else None

    @property
    def window(self) -> Sizes | None:
        """The window of the only grid; None where there is none, or several."""
        return self.grids[0].window if len(self.grids) == 1 else None

    @property
    def text(self) -> int:
        """Number of text tokens."""
        return sum(part.count for part in self.parts if isinstance(part, Text))

    @property
    def starts(self) -> tuple[int, ...]:
        """The first token of every part in the caller's sequence."""
        return tuple(accumulate((part.count for part in self.parts[:-1]), initial=0)) if self.parts else ()

    @cached_property
    def length(self) -> int | None:
        """Tokens of the sequence; None where there are no parts: any length."""
        return sum(part.count for part in self.parts) if self.parts else None

    # -- the block order ---------------------------------------------------------------------------

    @cached_property
    def is_ordered(self) -> bool:
        """Whether the block order can differ from the order of the sequence: it has a grid, or text not at its end."""
        is_text = [isinstance(part, Text) for part in self.parts]
        return bool(self.grids) or is_text != sorted(is_text)

    @property
    def order(self) -> np.ndarray | None:
        """Read-only int64 ``[length]``: position p of the block order holds the caller's token order[p].

        None where there are no parts. Made when first asked for; the last few layouts' orders are kept.
        """
        return _orders(self)[0] if self.parts else None

    @property
    def inverse(self) -> np.ndarray | None:
        """Read-only int64 ``[length]``: the caller's token i stands at position inverse[i] of the block order.

        None where there are no parts.
        """
        return _orders(self)[1] if self.parts else None

    @cached_property
    def protected(self) -> tuple[ProtectedRange, ...]:
        """The protected ranges of the block order, without gaps; together they are its end.

        Sinks that are protected as keys only come first, then other sinks, then text.
        """
        runs = self._named_runs
        stops = accumulate((run.tokens for run in runs), initial=(self.length or 0) - sum(run.tokens for run in runs))
        return tuple(
            ProtectedRange(run.name, start, start + run.tokens, run.rank > 0)
            for run, start in zip(runs, stops, strict=False)  # one stop more than runs: the end
        )

    @cached_property
    def _named_runs(self) -> tuple[ProtectedRun, ...]:
        """The protected tokens in block order; those of one name are told apart by their index in the sequence."""
        placed = zip(self.parts, self.starts, strict=True)
        runs = [run._replace(start=start + run.start) for part, start in placed for run in part.protected]
        several = {name for name, n in Counter(run.name for run in runs).items() if n > 1}
        seen: Counter[str] = Counter()
        named = []
        for run in runs:
            named.append(run._replace(name=f"{run.name}_{seen[run.name]}") if run.name in several else run)
            seen[run.name] += 1
        return tuple(sorted(named, key=lambda run: run.rank))

    def axis(self, length: int, side: int) -> BlockedAxis:
        """The side (0 query, 1 key) of an attention matrix with `length` tokens.

        A side whose length is not the layout's has no parts: its tokens keep their order and none is protected.
        Sinks that are protected as keys only are protected on the key side alone.

        Raises:
            LayoutError: a length or a side that is none.
        """
        length = as_int(length, "length", LayoutError)
        one_of(side, (0, 1), "side", LayoutError)
        if length != self.length:
            return BlockedAxis(length, self.block[side], False, length)
        starts = [r.start for r in self.protected if r.rows or side == 1]
        return BlockedAxis(length, self.block[side], self.is_ordered, starts[0] if starts else length)

    def to_blocks(self, x: Array, axis: int = 2) -> Array:
        """The tokens of an array in block order.

        Args:
            x: an array of any library that array-api-compat knows, such as NumPy or PyTorch.
            axis: the axis of its tokens, of the layout's length.

        Returns:
            An array of the same kind, shape and dtype, on the same device; `x` itself where the order does not change.

        Raises:
            LayoutError: not an array, or an axis that it does not have or that has another length.
        """
        return self._taken(x, axis, inverse=False)

    def from_blocks(self, x: Array, axis: int = 2) -> Array:
        """The tokens of an array in the order of the sequence again: undoes `to_blocks`.

        Args, returns and raises as `to_blocks`.
        """
        return self._taken(x, axis, inverse=True)

    def _taken(self, x: Array, axis: int, *, inverse: bool) -> Array:
        try:
            xp = namespace(x)
        except Exception:  # no array, or an object whose attributes fail
            raise LayoutError(f"x={shown(x)} is not an array; give one of NumPy, PyTorch or a like library") from None
        axis = self._checked_axis(x, axis)
        if not self.is_ordered:
            return x
        index = self.inverse if inverse else self.order
        assert index is not None
        try:
            # A copy: some libraries warn about, or write through, memory that is read-only.
            return xp.take(x, xp.asarray(index.copy(), device=device_of(x)), axis=axis)
        except (NotImplementedError, TypeError, RuntimeError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise LayoutError(cannot({"x": x}, "be put into another order", error)) from error

    def _checked_axis(self, x: Array, axis: Any) -> int:
        try:
            place = operator.index(axis)
            length = x.shape[place]
        except Exception:  # no integer, no such axis, an __index__ that fails, or a nested tensor, which has no shape
            raise LayoutError(f"axis={shown(axis)} is not an axis of an array of shape {shape_of(x)}") from None
        if self.length not in (None, length):
            raise LayoutError(
                f"axis {place} of an array of shape {tuple(x.shape)} has {length} tokens; the layout ({self}) has "
                f"{self.length}: give the axis of its tokens"
            )
        return place

    # -- text and JSON -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the parts, and the block sizes."""
        return {"parts": [part.to_dict() for part in self.parts], "block": [*self.block]}

    @classmethod
    def from_dict(cls, record: Any) -> TokenLayout:
        """The layout that `to_dict` wrote.

        Raises:
            LayoutError: the record is not that of a layout, or its values describe none.
        """
        if not isinstance(record, dict) or {*record} != {"parts", "block"}:
            raise LayoutError(f"{shown(record)} is not a layout; give {{'parts': [...], 'block': [q, k]}}")
        parts = _bounded(record["parts"])
        return cls(parts=tuple(part_from_dict(part) for part in parts), block=record["block"])

    def __str__(self) -> str:
        if not self.parts:
            return "no grid"
        texts = [i for i, part in enumerate(self.parts) if isinstance(part, Text)]
        if self.grid is not None and len(self.parts) - len(texts) == 1 and len(texts) <= 1:
            text = f" text={self.text}@{'end' if texts[0] else 'start'}" if texts else ""
            return f"grid {times(self.grid)}{text}"
        shown_parts = [str(part) for part in self.parts[:_MOST_PARTS_SHOWN]]
        more = len(self.parts) - len(shown_parts)
        return " + ".join([*shown_parts, f"{more} more parts"] if more else shown_parts)


def of_parts(parts: tuple[Part, ...], block: tuple[int, int]) -> TokenLayout:
    """The layout that was pickled: a function of its own, so that it can be named as safe to load."""
    return TokenLayout(parts=parts, block=block)


def _is_default(grid: Any, text: Any, text_position: str, sink: Any) -> bool:
    """Whether nothing of the short form is given."""
    nothing = grid is None and isinstance(text, int) and text == 0
    return nothing and text_position == "end" and isinstance(sink, str) and sink == "first_frame"


def _short_form(grid: Any, text: Any, text_position: str, sink: Any) -> tuple[Part, ...]:
    """The parts that the short form stands for."""
    words = Text(text)
    if grid is None:
        if words.count:
            raise LayoutError(
                f"text={words.count} needs a grid; give grid=(frames, height, width), or parts=(Text(...), ...)"
            )
        Grid(1, 1, 1, sink=sink)  # refuses a sink that is none
        return ()
    frames, height, width = as_box(grid, "grid")
    video = Grid(frames, height, width, sink=sink)
    return (words, video) if text_position == "start" else (video, words)


def _bounded(parts: Any) -> Sequence[Any]:
    if not isinstance(parts, tuple | list):
        raise LayoutError(f"parts={shown(parts)} is not a tuple; give (Text(226), Grid(21, 45, 80)), for example")
    if len(parts) > _MOST_PARTS:
        raise LayoutError(f"a layout of {len(parts)} parts; give at most {_MOST_PARTS}")
    return parts


def _checked_parts(parts: Any) -> tuple[Part, ...]:
    for part in _bounded(parts):
        if not isinstance(part, Part):
            raise LayoutError(f"{shown(part)} is not a part; give Grid(frames, height, width), Text(n) or Tokens(n)")
    return tuple(parts)


def _checked_window(window: Any, parts: Iterable[Part]) -> Sizes | None:
    if window is not None and not any(isinstance(part, Grid) for part in parts):
        raise LayoutError(
            f"window={shown(window)} needs a grid; give grid=(frames, height, width), or grid=(1, 1, n) for a row"
        )
    return None if window is None else as_box(window, "window")


def _settled(parts: Iterable[Part], block: tuple[int, int], window: Sizes | None) -> tuple[Part, ...]:
    """The canonical parts: none of 0 tokens, and every grid with its window."""
    settled = tuple(p.settled(block, window) if isinstance(p, Grid) else p for p in parts if p.count)
    total = sum(part.count for part in settled)
    if total > LARGEST:
        raise LayoutError(f"the parts have {total} tokens together; give at most {LARGEST}")
    return settled


@lru_cache(maxsize=32)
def _orders(layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
    """The block order of a layout with parts, and its inverse.

    Raises:
        LayoutError: of more tokens than are ordered, before memory is taken.
    """
    total = sum(part.count for part in layout.parts)
    if total > _MOST_ORDERED:
        raise LayoutError(
            f"the block order of {total} tokens and its inverse take {16 * total} bytes; at most {_MOST_ORDERED} "
            "tokens are ordered. Give order='given', or parts of fewer tokens"
        )
    windows, remainders, others = [], [], []
    for part, start in zip(layout.parts, layout.starts, strict=True):
        tokens = np.arange(start, start + part.count, dtype=np.int64)
        if isinstance(part, Grid):
            assert part.window is not None
            whole, rest = fold(tokens.reshape(part.sizes)[slice(*part.free_frames)], part.window)
            windows.append(whole)
            remainders.append(rest)
        elif isinstance(part, Tokens):
            others.append(tokens)
    protected = [np.arange(run.start, run.start + run.tokens) for run in layout._named_runs]
    order = np.concatenate([*windows, *remainders, *others, *protected])
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    order.flags.writeable = inverse.flags.writeable = False
    return order, inverse
