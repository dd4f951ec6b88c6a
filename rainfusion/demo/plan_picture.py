"""A plan without data: where every part of the sequence stands in the block order, and what is settled beforehand."""

from __future__ import annotations

from itertools import groupby
from os import PathLike
from typing import Any

import numpy as np

from rainfusion.core.errors import LayoutError
from rainfusion.core.layout import Grid, Text, TokenLayout
from rainfusion.core.plan import Plan
from rainfusion.core.windows import times
from rainfusion.demo import style
from rainfusion.demo.budget import kept_words
from rainfusion.demo.sequence import Piece, pieces

_WIDTH, _LEFT, _COLUMN = 12.0, 0.48, 6.5  # inches: the sheet, its margin, the left column
_TILES_TOP = 4.2  # inches below the top of the sheet
_MOST_TOKENS = 2**24
_MOST_TILES = 6
_MOST_TOKENS_WITH_EDGES = 2**16

_GRIDS = (style.KEPT, "#6a63a8", "#3f8f5f", "#a3527f")
_TOKENS = "#8796a5"
_PROTECTED = {"keys": "#f8d49b", "sink": style.PROTECTED, "text": "#d97b29"}
_GROUPS = {"windows": "whole windows", "ragged": "ragged", "tokens": "tokens"}


def draw(path: str | PathLike[str], plan: Plan) -> None:
    """Draw the parts of the sequence, the token order of a few frames, and the structure of the mask to a PNG file.

    Raises:
        LayoutError: the plan has no parts, or more than 2**24 tokens.
        PictureError: matplotlib is not installed, or the file cannot be written.
    """
    layout = plan.layout
    if layout.length is None:
        raise LayoutError("a plan without a grid or parts has no order to draw; give grid=(frames, height, width)")
    if layout.length > _MOST_TOKENS:
        raise LayoutError(f"an order of {layout.length:,} tokens is too long to draw; at most {_MOST_TOKENS:,} are")
    tiles = _tiles(layout)
    with style.figure(path, _WIDTH, 7.2 if len(tiles) <= 3 else 8.4) as figure:
        sheet = Sheet(figure)
        _draw_heading(sheet, plan)
        sheet.text(_LEFT, 1.35, "The sequence as given, and its block order", fontsize=11, fontweight="bold")
        _draw_sequence(sheet.axes(_LEFT, 1.72, _COLUMN, 1.42), layout)
        sheet.text(_LEFT, 3.92, _tiles_title(layout), fontsize=11, fontweight="bold")
        _draw_tiles(sheet, layout, tiles)
        _draw_structure(sheet.axes(7.75, 1.72, 3.8, 3.8), plan)
        _draw_legend(sheet.axes(7.75, 6.05, 3.8, 1.1), plan)


class Sheet:
    """A figure in inches, measured from its upper left corner."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure
        self.height = float(figure.get_figheight())

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes with their upper left corner at (left, top)."""
        bottom = self.height - top - height
        return self.figure.add_axes((left / _WIDTH, bottom / self.height, width / _WIDTH, height / self.height))

    def text(self, x: float, y: float, words: str, **look: Any) -> None:
        """Text whose middle is `y` below the top."""
        self.figure.text(x / _WIDTH, 1 - y / self.height, words, va="center", **look)


def _draw_heading(sheet: Sheet, plan: Plan) -> None:
    title = str(plan.layout)
    size = min(19.0, 19.0 * 46 / len(title))
    sheet.text(_LEFT, 0.41, title, fontsize=max(size, 8.0), fontweight="bold")
    share = "dense" if plan.is_dense else "by data" if plan.sparsity is None else f"{plan.sparsity:.1%} skipped"
    sheet.text(11.55, 0.41, share, fontsize=15, fontweight="bold", ha="right", color=style.KEPT)
    windows = list(dict.fromkeys(times(grid.window) for grid in plan.layout.grids if grid.window))
    facts = [
        f"{plan.layout.length:,} tokens",
        *([f"windows of {' and '.join(windows[:4])}"] if windows else []),
        f"blocks of {times(plan.block)}",
    ]
    if plan.protected_share is not None and not plan.is_dense:
        facts.append(f"protection takes {plan.protected_share:.0%} of what is kept")
    sheet.text(_LEFT, 0.82, "     ".join(facts), fontsize=10.5, color=style.MUTED)


# -- the sequence ----------------------------------------------------------------------------------


def _draw_sequence(axes: Any, layout: TokenLayout) -> None:
    """Two bars, as given above and in block order below, and ribbons from each piece to its place."""
    from matplotlib.patches import Rectangle

    assert layout.length is not None
    style.bare(axes)
    axes.set_xlim(0, layout.length)
    axes.set_ylim(0, 1)
    found = pieces(layout)
    for piece in found:
        colour = _piece_colour(layout, piece)
        _draw_ribbon(axes, piece, colour)
        for left, bottom in ((piece.start, 0.84), (piece.place, 0.0)):
            axes.add_patch(Rectangle((left, bottom), piece.tokens, 0.16, facecolor=colour, linewidth=0))
    for start in layout.starts[1:]:
        axes.plot([start, start], [0.84, 1.0], color=style.PAPER, linewidth=1.5)
    for part, start in zip(layout.parts, layout.starts, strict=True):
        _label(axes, start + part.count / 2, 1.04, str(part), part.count / layout.length, va="bottom")
    for name, group in groupby(found, key=lambda piece: _GROUPS.get(piece.kind, "protected")):
        span = list(group)
        left, right = span[0].place, span[-1].place + span[-1].tokens
        if left:
            axes.plot([left, left], [-0.02, 0.18], color=style.PAPER, linewidth=1.5)
        _label(axes, (left + right) / 2, -0.05, name, (right - left) / layout.length, va="top")


def _draw_ribbon(axes: Any, piece: Piece, colour: Any) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    top, bottom, middle = 0.84, 0.16, 0.5
    a, b, c, d = piece.start, piece.start + piece.tokens, piece.place + piece.tokens, piece.place
    corners = [
        (a, top),
        (b, top),
        (b, middle),
        (c, middle),
        (c, bottom),
        (d, bottom),
        (d, middle),
        (a, middle),
        (a, top),
    ]
    codes = [Path.MOVETO, Path.LINETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3]
    axes.add_patch(PathPatch(Path(corners, codes), facecolor=colour, alpha=0.32, linewidth=0))


def _label(axes: Any, x: float, y: float, words: str, share: float, **look: Any) -> None:
    """Words over a stretch of the bar, where they fit."""
    if share * _COLUMN > 0.068 * len(words):
        axes.text(x, y, words, ha="center", fontsize=8.5, color=style.MUTED, clip_on=False, **look)


def _part_colour(layout: TokenLayout, index: int) -> str:
    part = layout.parts[index]
    if isinstance(part, Grid):
        before = sum(isinstance(p, Grid) for p in layout.parts[:index])
        return _GRIDS[before % len(_GRIDS)]
    return _PROTECTED["text"] if isinstance(part, Text) else _TOKENS


def _piece_colour(layout: TokenLayout, piece: Piece) -> Any:
    from matplotlib.colors import to_rgb

    if piece.kind in _PROTECTED:
        return _PROTECTED[piece.kind]
    colour = np.array(to_rgb(_part_colour(layout, piece.part)))
    return tuple(colour * 0.55 + 0.45) if piece.kind == "ragged" else tuple(colour)


# -- frames ----------------------------------------------------------------------------------------


def _tiles_title(layout: TokenLayout) -> str:
    more = len(layout.grids) - _MOST_TILES
    return "Order within a frame: dark to light, lines where a block ends" + (
        f"; {more} more grids" if more > 0 else ""
    )


def _tiles(layout: TokenLayout) -> list[tuple[int, int]]:
    """(part index, frame) of the frames that are shown."""
    grids = [(index, part) for index, part in enumerate(layout.parts) if isinstance(part, Grid)][:_MOST_TILES]
    each = 4 if len(grids) == 1 else _MOST_TILES // max(len(grids), 1)
    tiles = []
    for index, grid in grids:
        wanted = dict.fromkeys((0, grid.frames - 1, min(1, grid.frames - 1), grid.frames // 2))
        tiles += [(index, frame) for frame in sorted([*wanted][:each])]
    return tiles


def _draw_tiles(sheet: Sheet, layout: TokenLayout, tiles: list[tuple[int, int]]) -> None:
    """Frames with every token coloured by its place in the frame's order."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(tiles), 3)
    rows = max(-(-len(tiles) // columns), 1)
    caption = 0.5 if len(layout.grids) > 1 else 0.34
    width = (_COLUMN - 0.25 * (columns - 1)) / columns
    height = (sheet.height - _TILES_TOP - 0.1) / rows - caption
    look = {"fontsize": 8.5, "color": style.MUTED, "va": "top", "linespacing": 1.4, "textcoords": "offset points"}
    for i, (index, frame) in enumerate(tiles):
        row, column = divmod(i, columns)
        left, top = _LEFT + (width + 0.25) * column, _TILES_TOP + (height + caption) * row
        axes = sheet.axes(left, top, width, height)
        axes.set_anchor("NW")
        style.bare(axes)
        _draw_frame(axes, layout, index, frame)
        axes.annotate(_frame_words(layout, index, frame), (0, 0), (0, -5), "axes fraction", **look)


def _draw_frame(axes: Any, layout: TokenLayout, index: int, frame: int) -> None:
    part, start = layout.parts[index], layout.starts[index]
    assert isinstance(part, Grid)
    assert layout.inverse is not None
    size = part.height * part.width
    first = start + frame * size
    places = layout.inverse[first : first + size].reshape(part.height, part.width)
    kind = _sink_kind(part, frame)
    if kind:
        axes.imshow(np.zeros(places.shape), cmap=style.ramp(_PROTECTED[kind], _PROTECTED[kind]))
        return
    rank = np.argsort(np.argsort(places, axis=None)).reshape(places.shape) / max(size - 1, 1)
    colours = style.ramp("#0b2a3b", _part_colour(layout, index), "#c9dfe0", "#f4efc9")
    axes.imshow(rank, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    if size <= _MOST_TOKENS_WITH_EDGES:
        _draw_edges(axes, places // layout.block[1])


def _sink_kind(grid: Grid, frame: int) -> str | None:
    """How a frame is protected: ``keys``, ``sink``, or not."""
    names = {"first_frame": 0, "last_frame": grid.frames - 1}
    for sink in grid.sinks:
        if names[sink.removesuffix("_keys")] == frame:
            return "keys" if sink.endswith("_keys") else "sink"
    return None


def _frame_words(layout: TokenLayout, index: int, frame: int) -> str:
    part = layout.parts[index]
    assert isinstance(part, Grid)
    kind = _sink_kind(part, frame)
    words = f"frame {frame + 1} of {part.frames}"
    words += {"keys": ", protected as keys", "sink": ", protected"}[kind] if kind else ""
    if len(layout.grids) == 1:
        return words
    return f"{part}\n{words}" if part.frames > 1 else str(part)


def _draw_edges(axes: Any, blocks: np.ndarray) -> None:
    """Thin lines where two neighbours lie in different blocks."""
    from matplotlib.collections import LineCollection

    lines = [[(x + 0.5, y - 0.5), (x + 0.5, y + 0.5)] for y, x in np.argwhere(blocks[:, 1:] != blocks[:, :-1])]
    lines += [[(x - 0.5, y + 0.5), (x + 0.5, y + 0.5)] for y, x in np.argwhere(blocks[1:] != blocks[:-1])]
    axes.add_collection(LineCollection(lines, colors=style.PAPER, linewidths=0.6, alpha=0.9))


# -- the mask --------------------------------------------------------------------------------------


def _draw_structure(axes: Any, plan: Plan) -> None:
    """The block pairs that are settled before any data, and what is left to the data."""
    from matplotlib.patches import Rectangle

    q, kv = plan.q_axis, plan.kv_axis
    axes.set_xlim(0, kv.blocks)
    axes.set_ylim(q.blocks, 0)
    axes.set_title("Mask: what is settled before the data")
    background = style.KEPT if plan.is_dense else style.SKIPPED
    axes.add_patch(Rectangle((0, 0), kv.blocks, q.blocks, color=background, linewidth=0))
    for kind, start, rows in _protected(plan.layout):
        colour = _PROTECTED[kind]
        top = start // q.block if rows and q.length == plan.layout.length else q.blocks
        axes.add_patch(Rectangle((0, top), kv.blocks, q.blocks - top, color=colour, linewidth=0))
        if kv.length == plan.layout.length:
            left = start // kv.block
            axes.add_patch(Rectangle((left, 0), kv.blocks - left, top, color=colour, linewidth=0))
    axes.set_xticks([0, kv.free_blocks], ["0", str(kv.free_blocks)])
    axes.set_yticks([0, q.free_blocks], ["0", str(q.free_blocks)])
    axes.tick_params(length=0)
    axes.set_xlabel(f"{kv.blocks} key blocks", fontsize=8.5)
    axes.set_ylabel(f"{q.blocks} query blocks", fontsize=8.5)
    if kv.free_blocks and q.free_blocks:
        colour = style.PAPER if plan.is_dense else style.INK
        look = {"ha": "center", "va": "center", "linespacing": 1.7, "color": colour, "fontsize": 9.5}
        axes.text(kv.free_blocks / 2, q.free_blocks / 2, _wrapped(plan), **look)


def _wrapped(plan: Plan) -> str:
    """What every unprotected row keeps, on lines that fit into the unprotected part."""
    from textwrap import fill

    share = plan.kv_axis.free_blocks / plan.kv_axis.blocks
    width = max(int(44 * share), 14)
    lead = "" if plan.is_dense else "The data decide here.\n"
    return lead + fill(f"Every row keeps {kept_words(plan)}.", width)


def _protected(layout: TokenLayout) -> list[tuple[str, int, bool]]:
    """(kind, first position, whether rows too) of every protected range, in block order."""
    kinds = [piece for piece in pieces(layout) if piece.kind in _PROTECTED]
    return [(piece.kind, piece.place, piece.kind != "keys") for piece in kinds]


def _draw_legend(axes: Any, plan: Plan) -> None:
    """The names of what is protected, beside the colours."""
    style.bare(axes)
    axes.set_xlim(0, 3.8)
    axes.set_ylim(1.1, 0)
    words = {
        "keys": "sinks as keys: every query attends to them",
        "sink": "sinks: dense as queries and as keys",
        "text": "text: dense as queries and as keys",
    }
    kinds = dict.fromkeys(kind for kind, _, _ in _protected(plan.layout))
    names = [(words[kind], _PROTECTED[kind]) for kind in kinds]
    names.append(("every block", style.KEPT) if plan.is_dense else ("chosen by the data", style.SKIPPED))
    for i, (name, colour) in enumerate(names):
        y = 0.15 + 0.27 * i
        axes.scatter([0.08], [y], s=52, marker="s", color=colour, edgecolor=style.LINE, linewidth=0.5)
        axes.text(0.25, y, name, fontsize=9, va="center", color=style.MUTED)
