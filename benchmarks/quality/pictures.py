"""The pictures of docs/quality.md: error against speed, and frames side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rainfusion.demo.style import ALERT, INK, KEPT, MUTED, PROTECTED, bare, figure

Row = dict[str, Any]
_CURVES = (
    ("published", "", "published rule", MUTED, "s", "published"),
    ("sink rows and columns", "", "one share, first frame kept", PROTECTED, "^", "sink rows and columns"),
    ("sink none", "", "one share, no sink", KEPT, "o", "sink none"),
    ("sink none", "budgets a head", "budgets a head, no sink", ALERT, "v", "sink none"),
    ("sink none, summaries", "budgets a head", "budgets a head, no sink, summaries", INK, "D", "sink none, summaries"),
)


def error_against_speed(runs: list[Row], speeds: list[Row], path: Path) -> None:
    """Relative L1 of every rule over the speed of its attention, one point a share.

    Budgets a head are drawn at the speed of one share for all heads: as many blocks in all.
    """
    with figure(path, 7.2, 4.2) as sheet:
        axes = sheet.subplots()
        for rule, note, said, colour, marker, timed_as in _CURVES:
            points = sorted(
                (
                    speed["speed_up"],
                    np.mean(row["relative_l1"]),
                    np.std(row["relative_l1"]) / len(row["relative_l1"]) ** 0.5,
                )
                for row in runs
                for speed in speeds
                if row["rule"] == rule
                and row["note"] == note
                and row["group"] in ("headline", "sinks", "budgets")
                and (speed["rule"], speed["asked"]) == (timed_as, row["asked"])
            )
            x, y, error = zip(*points, strict=True)
            style = {"linestyle": "--" if note else "-", "markerfacecolor": "white" if note else colour}
            axes.errorbar(x, y, error, label=said, color=colour, marker=marker, markersize=5, linewidth=1.4, **style)
        axes.set_ylim(0, 0.5)
        axes.set_xlabel("attention, times as fast as dense (21x45x80, 40 heads, H200)")
        axes.set_ylabel("relative L1 of the videos against dense")
        axes.legend(frameon=False, fontsize=8.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        sheet.tight_layout()


def frames(kept: Mapping[str, np.ndarray], path: Path, video: int = -1) -> None:
    """Frames of one video side by side: a row for dense attention, and two for every other run, itself and by how much.

    Args:
        kept: uint8 ``[videos, frames, H, W, 3]`` by what they are; ``dense`` is one of them.
        video: which.
    """
    dense = kept["dense"][video]
    rows = [("dense", dense)]
    for name in kept:
        if name not in ("truth", "dense"):
            far = np.abs(kept[name][video].astype(int) - dense.astype(int)) * 4
            rows += [(name, kept[name][video]), ("difference, 4 times", far.clip(0, 255).astype(np.uint8))]
    with figure(path, 1.5 * len(dense) + 1.9, 1.55 * len(rows)) as sheet:
        axes = sheet.subplots(len(rows), len(dense), squeeze=False)
        for (name, pictures), line in zip(rows, axes, strict=True):
            for picture, place in zip(pictures, line, strict=True):
                place.imshow(picture)
                bare(place)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8.5, color=INK)
        sheet.subplots_adjust(left=0.23, right=0.99, top=0.99, bottom=0.01, wspace=0.04, hspace=0.04)
