"""One picture of one comparison: the clip, where the error lies, what a head attends to, what it costs."""

from __future__ import annotations

from os import PathLike
from typing import Any

import numpy as np

from rainfusion.core.windows import times
from rainfusion.demo import style
from rainfusion.demo.compare import VARIANTS, Comparison

_WIDTH = 12.0
_LEFT, _RIGHT = 0.5, 11.5
_SHOWN_FRAMES = 4
_GAP = 0.14
_MATRIX = 3.3
_BY = " \N{MULTIPLICATION SIGN} "
_ERROR_TOP = 0.6  # relative error drawn in the last colour
_ERROR_COLOURS = ("#fbe3b3", style.PROTECTED, style.ALERT, "#6d1a36")


def draw(path: str | PathLike[str], title: str, frames: np.ndarray, found: Comparison, omitted: str = "drop") -> None:
    """Draw a comparison to a PNG file, 1800 pixels wide.

    Args:
        title: name of the clip.
        frames: the RGB frames the problem was made of, uint8 ``[frames, height, width, 3]``.
        omitted: the variant whose error is shown, ``"drop"`` or ``"summary"``.

    Raises:
        PictureError: matplotlib is not installed, or the file cannot be written.
    """
    shown = np.linspace(0, len(frames) - 1, min(_SHOWN_FRAMES, len(frames))).round().astype(int)
    strip = (_RIGHT - _LEFT - 3 * _GAP) / 4 * frames.shape[1] / frames.shape[2]
    with style.figure(path, _WIDTH, 2 * strip + 8.25) as figure:
        sheet = Sheet(figure)
        _heading(sheet, title, found)
        _clip_strip(sheet, strip, frames, shown)
        _error_strip(sheet, strip, frames, shown, found, omitted)
        _matrices_and_recall(sheet, found)
        _figures(sheet, found)


class Sheet:
    """A figure filled from the top, in inches; `y` is the height still free."""

    def __init__(self, figure: Any) -> None:
        self.figure = figure
        self.height = self.y = float(figure.get_figheight())

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes with their lower left corner at (x, y)."""
        return self.figure.add_axes((x / _WIDTH, y / self.height, width / _WIDTH, height / self.height))

    def text(self, x: float, y: float, words: str, **look: Any) -> None:
        """Text at (x, y)."""
        self.figure.text(x / _WIDTH, y / self.height, words, **{"va": "center", **look})

    def rule(self, y: float, left: float = _LEFT, right: float = _RIGHT) -> None:
        """A thin horizontal line."""
        from matplotlib.lines import Line2D

        ends = [left / _WIDTH, right / _WIDTH]
        self.figure.add_artist(Line2D(ends, [y / self.height] * 2, color=style.LINE, linewidth=0.8))


def _heading(sheet: Sheet, title: str, found: Comparison) -> None:
    problem, layout = found.plan.problem, found.plan.layout
    text = f" + {layout.text} text" if layout.text else ""
    facts = (
        f"{times(layout.grid or ()).replace('x', _BY)}{text} = {problem.q_len:,} tokens",
        f"windows of {times(layout.window or ()).replace('x', _BY)}",
        f"{problem.heads} heads of {problem.head_dim}",
        f"{found.backend} on {found.device}, {problem.dtype}",
    )
    sheet.text(_LEFT, sheet.y - 0.42, title, fontsize=22, fontweight="bold")
    skipped = f"{1 - found.density:.1%} of attention skipped"
    sheet.text(_RIGHT, sheet.y - 0.42, skipped, fontsize=16, ha="right", color=style.KEPT, fontweight="bold")
    sheet.text(_LEFT, sheet.y - 0.8, "     ".join(facts), fontsize=10.5, color=style.MUTED)
    sheet.y -= 1.08


def _clip_strip(sheet: Sheet, strip: float, frames: np.ndarray, shown: np.ndarray) -> None:
    for axes, i in zip(_row(sheet, strip, frames), shown, strict=False):
        axes.imshow(frames[i], aspect="auto")
        _caption(axes, f"frame {i + 1} of {len(frames)}")
    sheet.y -= strip + 0.45


def _error_strip(
    sheet: Sheet, strip: float, frames: np.ndarray, shown: np.ndarray, found: Comparison, omitted: str
) -> None:
    """The same frames in grey under the relative error of every token."""
    errors = _video_errors(found, omitted)
    words = f"Error of each token against dense attention, skipped blocks {VARIANTS[omitted]}"
    sheet.text(_LEFT, sheet.y - 0.08, words, fontsize=11, fontweight="bold")
    _error_scale(sheet)
    sheet.y -= 0.3
    protected = {r.name for r in found.plan.layout.protected}
    sinks = {frame for name, frame in (("first_frame", 0), ("last_frame", len(frames) - 1)) if name in protected}
    for axes, i in zip(_row(sheet, strip, frames), shown, strict=False):
        axes.imshow(frames[i].mean(axis=-1), aspect="auto", cmap="gray", vmin=-220, vmax=255)
        _lay_over(axes, errors[i], frames.shape[1:3])
        _caption(axes, f"mean {errors[i].mean():.2f}" + (", always attended" if i in sinks else ""))
    sheet.y -= strip + 0.5


def _row(sheet: Sheet, strip: float, frames: np.ndarray) -> list[Any]:
    """Bare axes for a row of frames."""
    width = strip * frames.shape[2] / frames.shape[1]
    row = [sheet.axes(_LEFT + i * (width + _GAP), sheet.y - strip, width, strip) for i in range(len(frames[:4]))]
    for axes in row:
        style.bare(axes)
    return row


def _caption(axes: Any, words: str) -> None:
    axes.text(0, -0.05, words, transform=axes.transAxes, fontsize=8.5, color=style.MUTED, va="top")


def _lay_over(axes: Any, error: np.ndarray, size: tuple[int, ...]) -> None:
    """Tokens coloured by their error, the less opaque the smaller it is."""
    share = np.clip(error / _ERROR_TOP, 0, 1)
    colours = style.ramp(*_ERROR_COLOURS)(share)
    colours[..., 3] = 0.92 * np.clip(1.6 * share - 0.1, 0, 1)
    axes.imshow(colours, extent=(0, size[1], size[0], 0), interpolation="nearest", aspect="auto")


def _error_scale(sheet: Sheet) -> None:
    axes = sheet.axes(_RIGHT - 1.75, sheet.y - 0.13, 1.3, 0.1)
    style.bare(axes)
    axes.imshow(np.linspace(0, 1, 64)[None], cmap=style.ramp(style.PAPER, *_ERROR_COLOURS), aspect="auto")
    for x, words, side in ((_RIGHT - 1.8, "0", "right"), (_RIGHT - 0.4, f"≥ {_ERROR_TOP:g}", "left")):
        sheet.text(x, sheet.y - 0.08, words, fontsize=8.5, color=style.MUTED, ha=side)


def _matrices_and_recall(sheet: Sheet, found: Comparison) -> None:
    head = len(found.mask) // 2
    bottom = sheet.y - 0.3 - _MATRIX
    _draw_mass(sheet.axes(_LEFT + 0.2, bottom, _MATRIX, _MATRIX), found, head)
    _draw_mask(sheet.axes(_LEFT + 4.0, bottom, _MATRIX, _MATRIX), found, head)
    sheet.text(_LEFT + 7.85, sheet.y - 0.14, "Attention kept", fontsize=11, fontweight="bold")
    _draw_recall(sheet.axes(_LEFT + 9.0, bottom + 0.62, _RIGHT - _LEFT - 9.0, _MATRIX - 0.75), found)
    words = (
        f"share of the softmax mass, mean of {len(found.mask)} heads;\n"
        f"all four keep the same {found.density:.1%} of block pairs"
    )
    sheet.text(_LEFT + 7.85, bottom + 0.25, words, fontsize=8.5, color=style.MUTED, linespacing=1.6)
    sheet.y = bottom - 0.75


def _draw_mass(axes: Any, found: Comparison, head: int) -> None:
    times_average = np.log10(np.maximum(found.mass[head] * found.mass.shape[-1], 1e-3))
    colours = style.ramp("#f7fafc", "#a9d0db", style.KEPT, "#0b2a3b")
    axes.imshow(times_average, cmap=colours, vmin=-1.0, vmax=1.2, interpolation="nearest", aspect="auto")
    axes.set_title(f"Dense attention, head {head + 1} of {len(found.mask)}")
    _block_axes(axes, found)


def _draw_mask(axes: Any, found: Comparison, head: int) -> None:
    from matplotlib.colors import ListedColormap

    q, kv = found.plan.q_axis, found.plan.kv_axis
    kinds = found.mask[head].astype(int)
    kinds[q.free_blocks :] = kinds[:, kv.free_blocks :] = 2
    colours = ListedColormap([style.SKIPPED, style.KEPT, style.PROTECTED])
    axes.imshow(kinds, cmap=colours, vmin=0, vmax=2, interpolation="nearest", aspect="auto")
    axes.set_title("What the plan keeps of it")
    _block_axes(axes, found)
    protected = ", ".join(r.name.replace("_", " ") for r in found.plan.layout.protected)
    names = [("kept", style.KEPT), ("skipped", style.SKIPPED)]
    names += [(f"{protected}, always kept", style.PROTECTED)] if protected else []
    for i, (name, colour) in enumerate(names):
        look = {"transform": axes.transAxes, "clip_on": False}
        left = (0.015, 0.19, 0.42)[i]
        axes.scatter([left], [-0.14], s=44, marker="s", color=colour, edgecolor=style.LINE, linewidth=0.5, **look)
        axes.text(left + 0.035, -0.14, name, fontsize=8.5, va="center", color=style.MUTED, **look)


def _block_axes(axes: Any, found: Comparison) -> None:
    rows, columns = found.mask.shape[1:]
    axes.set_xticks([0, columns - 1], ["1", str(columns)])
    axes.set_yticks([0, rows - 1], ["1", str(rows)])
    axes.tick_params(length=0)
    axes.set_xlabel("key blocks, in window order", fontsize=8.5, labelpad=-8)
    axes.set_ylabel("query blocks", fontsize=8.5, labelpad=-10)


def _draw_recall(axes: Any, found: Comparison) -> None:
    bars = (
        ("best possible", found.recall.oracle, style.LINE),
        ("this plan", found.recall.plan, style.KEPT),
        ("raster order", found.recall.raster, "#a3b7c4"),
        ("random blocks", found.recall.random, "#c9d3db"),
    )
    for place, (name, values, colour) in enumerate(bars):
        mean, weight = float(values.mean()), "bold" if name == "this plan" else "normal"
        axes.barh(-place, mean, height=0.6, color=colour)
        axes.text(mean + 0.012, -place, f"{mean:.0%}", va="center", fontsize=11, fontweight=weight)
        axes.text(-0.015, -place, name, va="center", ha="right", fontsize=9.5, fontweight=weight)
    style.bare(axes)
    axes.set_xlim(0, max(float(values.mean()) for _, values, _ in bars) * 1.25)


def _figures(sheet: Sheet, found: Comparison) -> None:
    """The strip of figures along the bottom, one half a variant."""
    half = (_RIGHT - _LEFT) / 2
    for i, (name, words) in enumerate(VARIANTS.items()):
        variant, x = found.variants[name], _LEFT + i * (half + 0.15)
        cells = (
            (f"{1 / variant.time_ratio:.2f}{_BY[1]}", f"as fast as dense\non {found.backend} too"),
            (f"{variant.relative_l1:.3f}", "relative L1\nagainst dense"),
            (f"{variant.cosine:.3f}", "cosine\nwith dense"),
        )
        sheet.rule(sheet.y, x, x + half - 0.15)
        sheet.text(x, sheet.y - 0.25, f"Skipped blocks {words}", fontsize=11, fontweight="bold")
        for j, (value, label) in enumerate(cells):
            left = x + (0.0, 2.15, 3.75)[j]
            sheet.text(left, sheet.y - 0.66, value, fontsize=20, fontweight="bold", color=style.KEPT)
            sheet.text(left, sheet.y - 0.9, label, fontsize=8.5, color=style.MUTED, va="top", linespacing=1.6)


def _video_errors(found: Comparison, omitted: str) -> np.ndarray:
    """Token errors as ``[frames, height, width]``, text left out."""
    layout = found.plan.layout
    (grid,) = layout.grids
    start = layout.starts[layout.parts.index(grid)]
    return found.errors[omitted][start : start + grid.count].reshape(grid.sizes)
