"""The parts that a sequence of tokens is made of: grids of video or image tokens, text, and other tokens.

A part is a frozen dataclass that knows its number of tokens (`count`), how it prints, and its form in JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, NamedTuple

from rainfusion.core.checks import LARGEST, as_int, as_sizes, one_of, shown
from rainfusion.core.errors import LayoutError
from rainfusion.core.windows import Sizes, compact_window, times, window_volume

SINKS = ("first_frame", "first_frame_keys", "last_frame", "last_frame_keys", None)
_NAMED_SINKS = SINKS[:-1]

Sink = str | tuple[str, ...] | None


class ProtectedRun(NamedTuple):
    """Consecutive tokens of a part that are protected.

    Attributes:
        name: ``first_frame``, ``last_frame`` or ``text``.
        start: the first of them, counted from the first token of the part.
        tokens: how many.
        rank: their place among all protected tokens, which stand in the block order by rank: 0 for sinks that are
            protected as keys only, 1 for other sinks, 2 for text.
    """

    name: str
    start: int
    tokens: int
    rank: int


@dataclass(frozen=True)
class Grid:
    """The tokens of a video or an image, stored frame by frame, row by row.

    Args:
        frames, height, width: sizes in tokens; an image has one frame.
        window: (t, h, w) tokens folded together; its volume is a multiple of both block sizes of the layout.
            Default: the most compact window of one block that fits into the frames that are no sink.
        sink: which frames are protected. ``"first_frame"`` and ``"last_frame"``: as queries and as keys, as the
            paper protects the first frame; with ``_keys`` appended: as keys only, that is, every query attends to
            the frame, and its own queries are sparse. A tuple names several; None protects no frame. A grid of one
            frame has no sink.

    Raises:
        LayoutError: a size below 1, more than 2**31 - 1 tokens, a window or a sink that is none.
    """

    frames: int
    height: int
    width: int
    window: Sizes | None = None
    sink: Sink = "first_frame"

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            object.__setattr__(self, name, as_int(getattr(self, name), name, LayoutError))
        if self.count > LARGEST:
            raise LayoutError(f"a grid of {times(self.sizes)} has {self.count} tokens; give at most {LARGEST}")
        if self.window is not None:
            object.__setattr__(self, "window", as_box(self.window, "window"))
        object.__setattr__(self, "sink", _checked_sink(self.sink))

    @property
    def sizes(self) -> Sizes:
        """(frames, height, width)."""
        return (self.frames, self.height, self.width)

    @property
    def count(self) -> int:
        """Number of tokens."""
        return prod(self.sizes)

    @property
    def sinks(self) -> tuple[str, ...]:
        """The protected frames by name, in the order of `SINKS`; none where there is one frame."""
        if self.sink is None or self.frames == 1:
            return ()
        return (self.sink,) if isinstance(self.sink, str) else self.sink

    @property
    def free_frames(self) -> tuple[int, int]:
        """The frames [start, stop) that are no sink; start equals stop where both of two frames are sinks."""
        first = any(name.startswith("first") for name in self.sinks)
        last = any(name.startswith("last") for name in self.sinks)
        return (int(first), self.frames - last)

    @property
    def protected(self) -> tuple[ProtectedRun, ...]:
        """The sinks."""
        frame = self.height * self.width
        starts = {"first_frame": 0, "last_frame": self.count - frame}
        names = [(sink.removesuffix("_keys"), sink.endswith("_keys")) for sink in self.sinks]
        return tuple(ProtectedRun(name, starts[name], frame, 0 if keys_only else 1) for name, keys_only in names)

    def settled(self, block: tuple[int, int], window: Sizes | None = None) -> Grid:
        """The grid as a layout holds it: its window is set, and its sink is one that it has.

        Args:
            block: (query block, key block) of the layout.
            window: for a grid without a window of its own.

        Raises:
            LayoutError: a window that does not fill whole blocks.
        """
        sizes = as_sizes(block, 2, "block", LayoutError)
        return _settled(self, (sizes[0], sizes[1]), None if window is None else as_box(window, "window"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        window = None if self.window is None else [*self.window]
        return {"grid": [*self.sizes], "window": window, "sink": [*self.sinks]}

    def __str__(self) -> str:
        return f"grid {times(self.sizes if self.frames > 1 else self.sizes[1:])}"


@lru_cache(maxsize=256)
def _settled(grid: Grid, block: tuple[int, int], window: Sizes | None) -> Grid:
    volume, (start, stop) = window_volume(block), grid.free_frames
    default = compact_window(volume, (stop - start or grid.frames, grid.height, grid.width))
    chosen = grid.window or window or default
    if prod(chosen) % volume:
        raise LayoutError(
            f"window={chosen} holds {prod(chosen)} tokens, which do not fill whole blocks of {block}; "
            f"choose t*h*w as a multiple of {volume}, such as {default}"
        )
    return Grid(*grid.sizes, chosen, grid.sinks)


@dataclass(frozen=True)
class _Run:
    """Tokens without a grid, which keep their order."""

    count: int
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", as_int(self.count, self.kind, LayoutError, minimum=0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {self.kind: self.count}

    def __str__(self) -> str:
        return f"{self.kind} {self.count}"


class Text(_Run):
    """Protected tokens, dense as queries and as keys: text, registers, or others of which no block may be skipped.

    Args, raises: a count, as in `Tokens`.
    """

    kind = "text"

    @property
    def protected(self) -> tuple[ProtectedRun, ...]:
        """All of them."""
        return (ProtectedRun("text", 0, self.count, 2),)


class Tokens(_Run):
    """Tokens without a grid whose blocks are selected as those of a grid are: audio, for example.

    Args:
        count: number of tokens; a layout leaves out a part of 0 tokens.

    Raises:
        LayoutError: a count below 0 or above 2**31 - 1.
    """

    kind = "tokens"

    @property
    def protected(self) -> tuple[ProtectedRun, ...]:
        """None of them."""
        return ()


Part = Grid | Text | Tokens


def part_from_dict(record: Any) -> Part:
    """The part that `to_dict` wrote.

    Raises:
        LayoutError: the record is not that of a part, or its values describe none.
    """
    fields = {*record} if isinstance(record, dict) else set()
    if fields == {"text"}:
        return Text(record["text"])
    if fields == {"tokens"}:
        return Tokens(record["tokens"])
    if "grid" in fields and fields <= {"grid", "window", "sink"}:
        frames, height, width = as_box(record["grid"], "grid")
        return Grid(frames, height, width, record.get("window"), record.get("sink", "first_frame"))
    raise LayoutError(
        f"{shown(record)} is not a part of a layout; give {{'grid': [frames, height, width], 'window': ..., "
        "'sink': ...}, {'text': count} or {'tokens': count}"
    )


def as_box(value: Any, name: str) -> Sizes:
    """Return `value` as three sizes (time, height, width), or raise LayoutError naming the argument."""
    frames, height, width = as_sizes(value, 3, name, LayoutError)
    return frames, height, width


def _checked_sink(sink: Any) -> Sink:
    """One form for every way to write the same sink: None, a name, or a tuple of names in the order of `SINKS`."""
    if not isinstance(sink, tuple | list):
        one_of(sink, SINKS, "sink", LayoutError)
        return None if sink is None else str(sink)
    for name in sink:
        one_of(name, _NAMED_SINKS, "sink", LayoutError)
    if len({name.removesuffix("_keys") for name in sink}) < len(sink):
        raise LayoutError(
            f"sink={shown(sink)} names a frame twice; give it once, with _keys (as keys only) or without "
            "(as queries and keys)"
        )
    names = tuple(str(name) for name in _NAMED_SINKS if name in sink)
    return names if len(names) > 1 else next(iter(names), None)
