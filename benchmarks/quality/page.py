"""Writes the tables and pictures of docs/quality.md from the records of `measure.py` and `speed.py`.

python benchmarks/quality/page.py
python benchmarks/quality/page.py --frames frames.npz     # also the picture of frames
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from generated import filled
from scipy.stats import ttest_rel

from quality import pictures
from quality.groups import SINKS
from rainfusion.core.layout import TokenLayout
from rainfusion.core.parts import Grid

ROOT = Path(__file__).parents[2]
RECORDS, PAGE, IMAGES = ROOT / "hw_matrix/results/quality", ROOT / "docs/quality.md", ROOT / "docs/images"
SINK_OF = {said: sink for sink, said in SINKS}

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=Path, help="frames that `measure.py --pictures` saved")
    args = parser.parse_args()
    record, speed = (json.loads((RECORDS / f"{name}-h200.json").read_text()) for name in ("quality", "speed"))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables(record, speed)), encoding="utf-8")
    pictures.error_against_speed(record["runs"], speed["rows"], IMAGES / "quality.png")
    if args.frames:
        pictures.frames(np.load(args.frames), IMAGES / "quality_frames.png")


def tables(record: Row, speed: Row) -> dict[str, str]:
    """Every table of the page, as Markdown, by name."""
    runs = record["runs"]
    return {
        "headline": _headline(record, speed["rows"]),
        "sinks": _sinks(runs),
        "selection": _selection(runs),
        "masses": _masses(runs),
        "schedule": _schedule(runs),
        "reuse": _reuse(runs),
        "combined": _combined(runs),
    }


# -- tables --------------------------------------------------------------------------------------------


def _headline(record: Row, speeds: list[Row]) -> str:
    runs, grid = record["runs"], record["grid"]
    anchor = _find(runs, "published", 0.8)
    shown = [row for row in runs if row["group"] in ("headline", "sinks", "budgets") and _is_shown(row)]
    lines = [
        "| rule | asked | skipped | protection, of what is kept | free blocks a row | relative L1 | median, worst "
        "| against published at 80 % | PSNR, dB | SSIM | cosine | error of motion | recall, 5th percentile "
        "| attention at 720p, times dense |",
        "|" + "---|" * 14,
    ]
    for row in sorted(shown, key=lambda row: (_ORDER.index(_said(row)), row["asked"])):
        protected, free = spent(row, tuple(grid))
        error = np.array(row["relative_l1"])
        lines.append(
            f"| {_said(row)} | {row['asked']:.0%} | {1 - row['density']:.1%} | {protected:.0%} | {free:.1f} "
            f"| {_mean(row)} | {np.median(error):.3f}, {error.max():.3f} | {_against(row, anchor)} "
            f"| {np.mean(row['psnr']):.1f} | {np.mean(row['ssim']):.3f} | {np.mean(row['cosine']):.3f} "
            f"| {np.mean(row['temporal']):.3f} | {_recall(row)} | {_speed(row, speeds)} |"
        )
    return "\n".join(lines)


_NAMES = {
    "published": "published",
    "sink rows and columns": "one share, default sink of `attention`",
    "sink none": "one share, no sink",
    "sink none, summaries": "one share, no sink, summaries",
    "random blocks, no sink": "random blocks, no sink",
    "raster order, no sink": "raster order, no sink",
}
_ORDER = [*_NAMES.values(), "budgets a head, no sink", "budgets a head, no sink, summaries"]


def _is_shown(row: Row) -> bool:
    return _said(row) in _ORDER and row["note"] != "uniform, applied"


def _said(row: Row) -> str:
    if row["note"] == "budgets a head":
        return row["rule"].replace("sink none", "budgets a head, no sink")
    return _NAMES.get(row["rule"], row["rule"])


def spent(row: Row, grid: tuple[int, int, int]) -> tuple[float, float]:
    """Of the block pairs that a run kept: the share that its sink takes, and what that leaves each other row."""
    sink = next((sink for said, sink in SINK_OF.items() if row["rule"].startswith(f"sink {said}")), None)
    sink = "first_frame" if row["rule"] == "published" else sink
    layout = TokenLayout(parts=(Grid(*grid, sink=sink),), block=128)
    rows, columns = (layout.axis(layout.length or 0, side) for side in (0, 1))
    pairs = rows.blocks * columns.blocks
    protected = pairs - rows.free_blocks * columns.free_blocks
    kept = row["density"] * pairs
    return protected / kept, max(kept - protected, 0.0) / rows.free_blocks


def _sinks(runs: list[Row]) -> str:
    shares = sorted({row["asked"] for row in runs if row["group"] == "sinks"})
    lines = ["| sink | " + " | ".join(f"{share:.0%}" for share in shares) + " |", "|---|" + "---|" * len(shares)]
    for also in ("", ", summaries"):
        for said in SINK_OF:
            found = [_find(runs, f"sink {said}{also}", share) for share in shares]
            base = [_find(runs, f"sink rows and columns{also}", share) for share in shares]
            cells = [f"{_mean(row)}{_missed(row)}{_mark(row, other)}" for row, other in zip(found, base, strict=True)]
            lines.append(f"| {said}{also} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _missed(row: Row) -> str:
    skipped = 1 - row["density"]
    return f" (at {skipped:.1%})" if abs(skipped - row["asked"]) > 0.0015 else ""


def _selection(runs: list[Row]) -> str:
    rows = [row for row in runs if row["group"] == "selection"]
    lines = [
        "| rule, without a sink | 80 % | against block means | 90 % | against block means |",
        "|---|---|---|---|---|",
    ]
    for rule in ["sink none", *dict.fromkeys(row["rule"] for row in rows)]:
        cells = [rule.replace("sink none", "block means, window 2x8x8, dropped")]
        for share in (0.8, 0.9):
            found = [row for row in runs if row["rule"] == rule and row["asked"] == share and not row["note"]]
            base = _find(runs, "sink none", share)
            cells += [_mean(found[0]), _against(found[0], base)] if found else ["not measured", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _masses(runs: list[Row]) -> str:
    rows = [row for row in runs if row["group"] == "masses"]
    lines = ["| rule | skipped | relative L1 | one share at as many blocks (interpolated) |", "|---|---|---|---|"]
    base = sorted((1 - row["density"], np.mean(row["relative_l1"])) for row in _uniform(runs))
    for row in rows:
        skipped = 1 - row["density"]
        expected = np.interp(skipped, *zip(*base, strict=True))
        lines.append(f"| {row['rule']} | {skipped:.1%} | {_mean(row)} | {expected:.3f} |")
    return "\n".join(lines)


def _uniform(runs: list[Row]) -> list[Row]:
    return [row for row in runs if row["group"] == "sinks" and row["rule"] == "sink none"]


def _schedule(runs: list[Row]) -> str:
    rows = [row for row in runs if row["group"] == "schedule" and row["asked"] == 0.8]
    lines = ["| dense steps, first + last of 30 | relative L1 | PSNR, dB | error of motion |", "|---|---|---|---|"]
    for row in rows:
        first, last = row["dense_steps"]
        cells = f"{_mean(row)} | {np.mean(row['psnr']):.1f} | {np.mean(row['temporal']):.3f}"
        lines.append(f"| {first} + {last} | {cells} |")
    return "\n".join(lines)


def _reuse(runs: list[Row]) -> str:
    rows = [row for row in runs if row["group"] == "reuse"]
    lines = ["| setting | masks used again | relative L1 | against always fresh |", "|---|---|---|---|"]
    for row in rows:
        said = ", ".join(f"`{name}={value}`" for name, value in re.findall(r"(\w+) ([\d.]+)", row["note"]))
        lines.append(f"| {said} | {row['reused']:.0%} | {_mean(row)} | {_against(row, rows[0])} |")
    return "\n".join(lines)


def _combined(runs: list[Row]) -> str:
    anchor = _find(runs, "published", 0.8)
    budgets = [row for row in runs if row["rule"] == "sink none, summaries" and row["note"] == "budgets a head"]
    rows = [row for row in budgets if row["asked"] >= 0.8]
    rows += [row for row in runs if row["group"] == "combined"]
    lines = [
        "| window, block | skipped | relative L1 | median, worst | against published at 80 % | PSNR, dB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = np.array(row["relative_l1"])
        lines.append(
            f"| {_COMBINED.get(row['rule'], row['rule'])} | {1 - row['density']:.0%} | {_mean(row)} "
            f"| {np.median(error):.3f}, {error.max():.3f} | {_against(row, anchor)} | {np.mean(row['psnr']):.1f} |"
        )
    return "\n".join(lines)


_COMBINED = {
    "sink none, summaries": "2x8x8, 128",
    "{'window': (4, 4, 8)}": "4x4x8, 128",
    "{'window': (8, 4, 4)}": "8x4x4, 128",
    "{'block': 64}": "2x4x8, 64",
    "{'window': (4, 4, 4), 'block': 64}": "4x4x4, 64",
}


# -- cells ---------------------------------------------------------------------------------------------


def _find(runs: list[Row], rule: str, share: float) -> Row:
    return next(row for row in runs if row["rule"] == rule and row["asked"] == share and not row["note"])


def _mean(row: Row) -> str:
    return f"{np.mean(row['relative_l1']):.3f}"


def _against(row: Row, other: Row) -> str:
    """Times the other's error, and the p-value of a paired t-test over scenes."""
    if row is other:
        return "1"
    a, b = np.array(row["relative_l1"]), np.array(other["relative_l1"])
    if np.array_equal(a, b):
        return "1"
    p = float(ttest_rel(a, b).pvalue)
    return f"{a.mean() / b.mean():.2f}, " + ("p < 0.001" if p < 0.001 else f"p = {p:.3f}")


def _mark(row: Row, other: Row) -> str:
    """A plus where the error is smaller than the other's, a minus where it is larger, by a paired t-test at 1 %."""
    if row is other:
        return ""
    found = ttest_rel(row["relative_l1"], other["relative_l1"])
    if not found.pvalue < 0.01:
        return ""
    return " +" if found.statistic < 0 else " -"


def _recall(row: Row) -> str:
    return f"{row['recall']:.2f}, {row['recall_5th']:.2f}" if "recall" in row else ""


def _speed(row: Row, speeds: list[Row]) -> str:
    found = [s["speed_up"] for s in speeds if s["rule"] == row["rule"] and s["asked"] == row["asked"]]
    return f"{found[0]:.1f}" if found and not row["note"] else ""


if __name__ == "__main__":
    main()
