"""The pictures of docs/concepts.md, drawn from a clip that the package holds, by the package's own plans and masks.

python docs/draw_concepts.py             # writes docs/images/concepts
python docs/draw_concepts.py FOLDER
"""

from __future__ import annotations

import sys
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import rainfusion
from rainfusion.demo import features, plan_picture, style
from rainfusion.testing.inputs import CLIP

FOLDER = Path(__file__).parent / "images" / "concepts"
GRID, TEXT, HEAD = (9, 16, 32), 128, 0
LAYOUT = rainfusion.TokenLayout(GRID, TEXT, block=64, sink="first_frame_keys")
SPARSITY = 0.6
_COLOURS = 160  # of a picture file: flat colours need few


class Scene(NamedTuple):
    """What the pictures show: one head of a real clip.

    Attributes:
        frames: brightness ``[frames, height, width]``, from 0 to 1.
        plan: the plan of the head.
        score: float32 ``[blocks, blocks]``, between block means.
        mask: bool ``[blocks, blocks]``, what the plan keeps.
        mass: ``[blocks, blocks]``, the share of dense attention that each pair of blocks holds in its row.
        summaries: the same, where every block outside the mask counts through its mean.
    """

    frames: np.ndarray
    plan: rainfusion.Plan
    score: np.ndarray
    mask: np.ndarray
    mass: np.ndarray
    summaries: np.ndarray


@cache
def scene() -> Scene:
    """The clip, as blocks and what is selected of them."""
    with CLIP.open("rb") as file:
        frames = np.load(file)["frames"][: GRID[0], 8:72]
    q, k, _ = (x[:, HEAD : HEAD + 1] for x in features.qkv(np.repeat(frames[..., None], 3, axis=-1), GRID, text=TEXT))
    problem = rainfusion.AttentionProblem.from_tensors(q, k, k)
    plan = rainfusion.plan(problem, LAYOUT, rainfusion.TopK(SPARSITY), returns=("%score", "%mask"))
    mask, score = rainfusion.lower(plan, like=q, backend="reference")(q, k, k)
    kept = np.asarray(mask.blocks)[0, 0]
    mass, summaries = _masses(*(x[0, 0, LAYOUT.order] * problem.head_dim**-0.25 for x in (q, k)), kept)
    return Scene(frames / 255, plan, score[0, 0], kept, mass, summaries)


def _masses(q: np.ndarray, k: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax mass by block, means over the queries of a block: dense, and with summaries of what is not kept."""
    blocks, size = len(kept), LAYOUT.block[1]
    logits = q @ k.T
    dense = np.exp(logits - logits.max(axis=1, keepdims=True)).reshape(len(q), blocks, size).sum(axis=2)
    means = np.exp(q @ k.reshape(blocks, size, -1).mean(axis=1).T - logits.max(axis=1, keepdims=True)) * size
    mixed = np.where(np.repeat(kept, size, axis=0), dense, means)
    dense, mixed = (
        (x / x.sum(axis=1, keepdims=True)).reshape(blocks, size, blocks).mean(axis=1) for x in (dense, mixed)
    )
    return dense, mixed


# -- the pictures ----------------------------------------------------------------------------------


def draw_blocks(path: Path) -> None:
    """One block of 128 tokens in raster order and in block order, on the frames of the clip."""
    assert LAYOUT.inverse is not None
    video, block = int(np.prod(GRID)), LAYOUT.block[0]
    raster = np.arange(video).reshape(GRID) // block
    windows = LAYOUT.inverse[:video].reshape(GRID) // block
    with style.figure(path, 9.0, 3.9) as figure:
        rows = (
            ("Raster order: a block is a strip of one frame", raster, raster[3, 9, 12]),
            ("Block order: a block is a window, a box of two frames", windows, windows[3, 9, 12]),
        )
        for i, (title, blocks, one) in enumerate(rows):
            bottom = 0.56 - 0.51 * i
            figure.text(0.02, bottom + 0.365, title, fontsize=11, fontweight="bold")
            for j, frame in enumerate(range(2, 6)):
                axes = figure.add_axes((0.02 + 0.245 * j, bottom, 0.225, 0.33))
                _frame(axes, frame, blocks[frame] == one, blocks[frame])
                axes.set_xlabel(f"frame {frame + 1}", fontsize=8.5)


def draw_layout(path: Path) -> None:
    """A sequence of text and an odd grid, as given and in block order, and what of its mask is known beforehand."""
    layout = rainfusion.TokenLayout((9, 18, 36), text=128, text_position="start", block=64)
    problem = rainfusion.AttentionProblem(1, 1, layout.length, layout.length, 64)
    plan_picture.draw(path, rainfusion.plan(problem, layout, rainfusion.TopK(0.4)))


def draw_selection(path: Path) -> None:
    """Scores between block means, the blocks that are kept, and those of one query block on the clip."""
    found = scene()
    one = _block_at(5, 8, 16)
    with style.figure(path, 9.0, 6.3) as figure:
        axes = figure.add_axes((0.05, 0.46, 0.34, 0.46))
        axes.imshow(found.score, cmap=style.ramp(style.PAPER, "#9cc3d0", style.KEPT, "#0b2a3b"))
        _block_axes(axes, "Scores between block means")
        axes = figure.add_axes((0.47, 0.46, 0.34, 0.46))
        kind = found.mask.astype(int)
        for _, start, stop, rows in LAYOUT.protected:
            span = slice(start // LAYOUT.block[0], -(-stop // LAYOUT.block[0]))
            kind[:, span] = 2
            if rows:
                kind[span] = 2
        axes.imshow(kind, cmap=_colours(style.SKIPPED, style.KEPT, style.PROTECTED), vmin=0, vmax=2)
        _block_axes(axes, f"Kept: {found.plan.density:.0%} of the pairs")
        axes.set_xlim(-0.5, len(kind) - 0.5)
        axes.axhline(one, color=style.ALERT, linewidth=1.2)
        for i, (name, colour) in enumerate(
            (("omitted", style.SKIPPED), ("selected", style.KEPT), ("protected", style.PROTECTED))
        ):
            axes.scatter([79], [4 + 6 * i], s=60, marker="s", color=colour, edgecolor=style.LINE, clip_on=False)
            axes.text(82, 4 + 6 * i, name, fontsize=9, va="center", color=style.MUTED)
        axes.text(77, one, "query block below", fontsize=9, va="center", color=style.ALERT)
        figure.text(0.02, 0.345, "What the marked query block attends to", fontsize=11, fontweight="bold")
        for j, frame in enumerate((0, 3, 5, 7)):
            axes = figure.add_axes((0.02 + 0.245 * j, 0.06, 0.225, 0.26))
            blocks = _blocks_of(frame)
            _frame(axes, frame, found.mask[one][blocks], blocks, marked=blocks == one)
            axes.set_xlabel("frame 1, the sink" if frame == 0 else f"frame {frame + 1}", fontsize=8.5)


def draw_summaries(path: Path) -> None:
    """The attention of one query block by key block: dense, with blocks dropped, and with summaries."""
    found = scene()
    one = _block_at(5, 8, 16)
    kept, dense = found.mask[one], found.mass[one]
    dropped = np.where(kept, dense, 0) / dense[kept].sum()
    with style.figure(path, 9.0, 4.6) as figure:
        rows = (
            ("Dense: every token of every block", dense, style.KEPT),
            ("Dropped: omitted blocks have no weight, the others too much", dropped, style.SKIPPED),
            ("Summary: each omitted block counts through its mean", found.summaries[one], style.PROTECTED),
        )
        top = max(row[1].max() for row in rows) * 1.08
        for i, (title, mass, colour) in enumerate(rows):
            axes = figure.add_axes((0.06, 0.71 - 0.315 * i, 0.92, 0.2))
            axes.bar(np.arange(len(mass)), mass, color=[style.KEPT if keep else colour for keep in kept])
            axes.step(np.arange(len(mass) + 1) - 0.5, [*dense, dense[-1]], where="post", color=style.INK, linewidth=0.8)
            axes.set_title(title)
            axes.set_ylim(0, top)
            axes.set_xlim(-0.6, len(mass) - 0.4)
            axes.set_xticks([])
            axes.set_yticks([])
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
        axes.set_xlabel("key blocks in block order; the line is dense attention", fontsize=8.5)


def draw_lowering(path: Path) -> None:
    """One plan, and which kernels run its operations on three backends."""
    problem = rainfusion.AttentionProblem(1, 40, 4736, 4736, 128)
    plan = rainfusion.plan(problem, LAYOUT, rainfusion.TopK(SPARSITY), omitted="summary")
    lowered = [rainfusion.lower(plan, device="cpu", backend=name) for name in ("reference", "torch", "openvino")]
    shown = [op for step in lowered[-1].steps for op in step.segment.ops]  # in an order in which kernels are whole
    with style.figure(path, 9.0, 0.85 + 0.42 * len(shown)) as figure:
        axes = figure.add_axes((0.01, 0.02, 0.98, 0.96))
        style.bare(axes)
        axes.set_xlim(0, 10)
        axes.set_ylim(len(shown) + 0.1, -1.3)
        axes.text(0.1, -0.75, "Plan", fontsize=11, fontweight="bold")
        for row, op in enumerate(shown):
            axes.text(0.1, row + 0.5, op.name, fontsize=10, family="DejaVu Sans Mono", va="center")
            axes.text(
                1.75,
                row + 0.5,
                " ".join(getattr(op, name) for name in op.results if getattr(op, name)),
                fontsize=8.5,
                color=style.MUTED,
                va="center",
            )
        for column, executable in enumerate(lowered):
            left = 3.7 + 2.12 * column
            axes.text(left, -0.75, f"{executable.backend.name}", fontsize=11, fontweight="bold")
            axes.text(left, -0.25, "executable", fontsize=8.5, color=style.MUTED)
            for step in executable.steps:
                _step(axes, left, sorted(shown.index(op) for op in step.segment.ops), step.by)


# -- parts of pictures -----------------------------------------------------------------------------


def _step(axes: Any, left: float, rows: list[int], by: str) -> None:
    """A box over each run of rows that one step runs, joined where the step has several."""
    from matplotlib.patches import FancyBboxPatch

    definition = by == "definition"
    fill, ink = (style.SKIPPED, style.MUTED) if definition else (style.KEPT, style.PAPER)
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    for run in runs:
        top, height = run[0] + 0.12, len(run) - 0.24
        axes.add_patch(
            FancyBboxPatch((left, top), 1.9, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=fill, lw=0)
        )
        name = "definition" if definition else "one kernel" if len(rows) > 1 else "a kernel"
        axes.text(left + 0.95, top + height / 2, name, ha="center", va="center", fontsize=9, color=ink)
    for above, below in pairwise(runs):
        axes.plot([left + 0.95] * 2, [above[-1] + 0.88, below[0] + 0.12], color=fill, linewidth=5)


def _frame(axes: Any, frame: int, lit: np.ndarray, blocks: np.ndarray, marked: np.ndarray | None = None) -> None:
    """A frame of the clip, faint, with the tokens that are lit in colour and a line around every block."""
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    picture = np.repeat(0.72 + 0.28 * scene().frames[frame][..., None], 3, axis=-1)
    for tokens, colour in ((lit, style.KEPT), (marked, style.ALERT)):
        if tokens is not None:
            at = np.kron(tokens, np.ones((4, 4))) > 0
            picture[at] = 0.35 * scene().frames[frame][at][:, None] + 0.65 * np.array(to_rgb(colour))
    height, width = blocks.shape
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
    lines = [
        [(x, y), (x, y + 1)] for y, x in product(range(height), range(1, width)) if blocks[y, x] != blocks[y, x - 1]
    ]
    lines += [
        [(x, y), (x + 1, y)] for y, x in product(range(1, height), range(width)) if blocks[y, x] != blocks[y - 1, x]
    ]
    axes.add_collection(LineCollection(lines, colors=style.PAPER, linewidths=0.8))
    style.bare(axes)


def _block_axes(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("key blocks", fontsize=8.5)
    axes.set_ylabel("query blocks", fontsize=8.5)
    axes.set_xticks([])
    axes.set_yticks([])


def _colours(*colours: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(colours)


def _blocks_of(frame: int) -> np.ndarray:
    """The block of every token of a frame, ``[height, width]``."""
    assert LAYOUT.inverse is not None
    return LAYOUT.inverse[: int(np.prod(GRID))].reshape(GRID)[frame] // LAYOUT.block[0]


def _block_at(frame: int, row: int, column: int) -> int:
    return int(_blocks_of(frame)[row, column])


PICTURES = {
    "blocks.png": draw_blocks,
    "layout.png": draw_layout,
    "selection.png": draw_selection,
    "summaries.png": draw_summaries,
    "lowering.png": draw_lowering,
}


def draw_all(folder: Path) -> None:
    """Draw every picture into a folder, in few colours."""
    from PIL import Image

    for name, draw in PICTURES.items():
        draw(folder / name)
        with Image.open(folder / name) as image:
            image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(folder / name, optimize=True)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
