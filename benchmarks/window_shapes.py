"""How much of dense attention each window shape keeps, on real clips: which windows make blocks alike.

    python benchmarks/window_shapes.py
    python benchmarks/window_shapes.py --block 64 --grid 21x16x32 --sparsity 0.9

Recall is the share of dense attention's mass on the kept blocks, averaged over heads, with the first frame
treated as any other (sink=None), so that the figures speak of windows alone. Needs the `demo` extra, no torch.
"""

from __future__ import annotations

import argparse
from itertools import product

import rainfusion
from rainfusion.core.layout import times
from rainfusion.core.ops import select
from rainfusion.core.windows import Sizes
from rainfusion.demo import decode, features
from rainfusion.demo.metrics import block_mass, block_scores, recall

CLIPS = ("bikes", "bigbuckbunny", "carphone")


def main() -> None:
    args = arguments()
    grid: Sizes = tuple(int(n) for n in args.grid.split("x"))  # type: ignore[assignment]
    default = rainfusion.TokenLayout(grid, block=args.block, sink=None).window
    tensors = {clip: features.qkv(decode.load(clip, grid), grid)[:2] for clip in CLIPS}
    rows = [
        (window, [kept_mass(*tensors[clip], grid, window, args) for clip in CLIPS])
        for window in shapes(args.block, grid)
    ]
    print(f"grid {args.grid}, block {args.block}, {args.sparsity:.0%} skipped; recall by window")
    print(f"{'window':>9} " + " ".join(f"{clip:>13}" for clip in CLIPS) + f" {'mean':>7}")
    for window, kept in sorted(rows, key=lambda row: -sum(row[1])):
        mean = sum(kept) / len(kept)
        mark = "  default" if window == default else ""
        print(f"{times(window):>9} " + " ".join(f"{share:>13.3f}" for share in kept) + f" {mean:>7.3f}{mark}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", default="20x16x32")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.8)
    return parser.parse_args()


def shapes(volume: int, grid: Sizes) -> list[Sizes]:
    """Windows of the volume that fit into the grid, no more than four times as wide as high or as high as wide."""
    divisors = [n for n in range(1, volume + 1) if volume % n == 0]
    windows = [(t, h, volume // (t * h)) for t, h in product(divisors, divisors) if volume % (t * h) == 0]
    return [w for w in windows if all(a <= b for a, b in zip(w, grid, strict=True)) and 1 / 4 <= w[1] / w[2] <= 4]


def kept_mass(q: object, k: object, grid: Sizes, window: Sizes, args: argparse.Namespace) -> float:
    """Mean recall over heads of the blocks that block means choose in windows of this shape."""
    layout = rainfusion.TokenLayout(grid, window=window, block=args.block, sink=None)
    length, scale = layout.length or 0, q.shape[3] ** -0.5  # type: ignore[attr-defined]
    rows, columns = layout.axis(length, 0), layout.axis(length, 1)
    scores = block_scores(q, k, layout, scale)
    quotas = rainfusion.TopK(args.sparsity).budget(rows, columns, 1).quotas
    mask = select(scores, quotas, q=rows, kv=columns)
    return float(recall(block_mass(q, k, layout, scale), mask, rows.counts).mean())


if __name__ == "__main__":
    main()
