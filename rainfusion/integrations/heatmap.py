"""The picture of a report: density by denoising step and layer."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from rainfusion.demo import style

if TYPE_CHECKING:
    from rainfusion.integrations.report import Report

_MOST_PANELS = 8
_MOST_CELLS = 2**24  # of a panel; no screen shows more
_UNKNOWN = 0.5  # a density that only the data knows


def draw(report: Report, path: str | PathLike[str]) -> None:
    """Write the heat map of a report: a panel for every model and context of its last run.

    Raises:
        PictureError: as `style.figure`, or more layers and steps than can be drawn.
    """
    panels = _panels(report)
    with style.figure(path, 1.6 + 2.8 * max(len(panels), 1), 3.4) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.subplots(1, max(len(panels), 1), squeeze=False, sharey="all")[0]
        if not panels:
            axes[0].set_title("no forward yet")
            axes[0].axis("off")
            return
        for ax, (name, grid) in zip(axes, panels.items(), strict=True):
            image = ax.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap=_colours(), interpolation="nearest")
            ax.set_title(name)
            ax.set_xlabel("denoising step")
            for axis in (ax.xaxis, ax.yaxis):
                axis.get_major_locator().set_params(integer=True)
        axes[0].set_ylabel("layer")
        bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.9)
        bar.set_label("block pairs attended; white: not called")


def _colours() -> Any:
    return style.ramp(style.SKIPPED, style.KEPT, style.INK)


def _panels(report: Report) -> dict[str, Any]:
    """``[layers, steps]`` a model and context; NaN where a layer was not called."""
    last = max((row.run for row in report.rows), default=0)
    panels: dict[str, Any] = {}
    steps = 1 + max((row.step for row in report.rows if row.run == last), default=0)
    for row in report.rows:
        if row.run != last:
            continue
        name = f"{row.model} {row.context}".strip()
        if name not in panels:
            if len(panels) == _MOST_PANELS:
                continue
            shape = (report.layers[row.model], steps)
            if shape[0] * shape[1] > _MOST_CELLS:
                raise style.PictureError(
                    f"a heat map of {shape[0]} layers and {steps} steps takes {8 * shape[0] * steps} bytes; "
                    f"at most {8 * _MOST_CELLS} are drawn"
                )
            panels[name] = np.full(shape, np.nan)
        if row.kind != "skipped":
            panels[name][row.layer, row.step] = _UNKNOWN if row.density is None else row.density
    return panels
