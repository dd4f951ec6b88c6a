"""The look of every picture: one palette, one type, no decoration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from os import PathLike
from typing import Any

from rainfusion.core.checks import shown
from rainfusion.core.errors import RainfusionError
from rainfusion.core.files import IrregularFileError, as_path

PAPER, INK, MUTED, LINE = "#ffffff", "#1b2733", "#6b7885", "#d5dbe1"
SKIPPED, KEPT, PROTECTED, ALERT = "#edf1f5", "#1f6f8b", "#f2a541", "#c8442d"

_SETTINGS: Any = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


class PictureError(RainfusionError, RuntimeError):
    """A picture cannot be drawn: matplotlib is not installed, or the file cannot be written."""


def require_matplotlib() -> None:
    """Raise PictureError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise PictureError("drawing needs matplotlib, which is not installed; pip install 'rainfusion[demo]'")


@contextmanager
def figure(path: str | PathLike[str], width: float, height: float) -> Iterator[Any]:
    """A figure of that size in inches, written to `path` as PNG when the block ends.

    Raises:
        PictureError: matplotlib is not installed, no path, or the file cannot be written.
    """
    require_matplotlib()
    try:
        place = as_path(path)
    except IrregularFileError as error:
        raise PictureError(str(error)) from None
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        sheet = Figure(figsize=(width, height))
        FigureCanvasAgg(sheet)
        yield sheet
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            sheet.savefig(place, dpi=150, format="png")
        except OSError as error:
            raise PictureError(f"{shown(str(place))} cannot be written: {error.strerror or error}") from error


def ramp(*colours: str) -> Any:
    """A continuous colour map through these colours."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("rainfusion", list(colours))


def bare(axes: Any) -> None:
    """Take ticks and frame away."""
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
