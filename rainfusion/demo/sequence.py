"""How the parts of a sequence stand in its block order, piece by piece: for pictures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from math import prod
from typing import NamedTuple

from rainfusion.core.layout import Grid, Part, Text, TokenLayout

KINDS = ("windows", "ragged", "tokens", "keys", "sink", "text")
"""Kinds of pieces in the order in which they stand in the block order; from ``keys`` on they are protected."""


class Piece(NamedTuple):
    """Tokens of one part that are treated alike and follow each other in the block order.

    Attributes:
        part: index of the part.
        kind: one of `KINDS`; ``keys`` are sinks that are protected as keys only.
        tokens: how many.
        start: the first place in the sequence. The ragged rest of a grid is drawn after its whole windows, though it
            lies among them.
        place: the first position in the block order.
    """

    part: int
    kind: str
    tokens: int
    start: int
    place: int


def pieces(layout: TokenLayout) -> list[Piece]:
    """The pieces of a layout, in block order."""
    found = []
    for index, (part, start) in enumerate(zip(layout.parts, layout.starts, strict=True)):
        counts = [(kind, count) for kind, count in _of_part(part) if count]
        starts = accumulate((count for _, count in counts), initial=start)
        found += [Piece(index, kind, count, at, 0) for (kind, count), at in zip(counts, starts, strict=False)]
    found.sort(key=lambda piece: KINDS.index(piece.kind))  # stable: parts of one kind stay in order
    places = accumulate((piece.tokens for piece in found), initial=0)
    return [piece._replace(place=place) for piece, place in zip(found, places, strict=False)]


def _of_part(part: Part) -> Iterator[tuple[str, int]]:
    if not isinstance(part, Grid):
        yield ("text" if isinstance(part, Text) else "tokens"), part.count
        return
    sinks = {sink.removesuffix("_keys"): "keys" if sink.endswith("_keys") else "sink" for sink in part.sinks}
    frame = part.height * part.width
    start, stop = part.free_frames
    free = (stop - start, part.height, part.width)
    window = part.window or (1, 1, 1)
    whole = prod(size - size % step for size, step in zip(free, window, strict=True))
    if "first_frame" in sinks:
        yield sinks["first_frame"], frame
    yield "windows", whole
    yield "ragged", prod(free) - whole
    if "last_frame" in sinks:
        yield sinks["last_frame"], frame
