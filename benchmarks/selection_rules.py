"""How much of dense attention other selection rules would keep, at the same number of blocks, on real clips.

    python benchmarks/selection_rules.py
    python benchmarks/selection_rules.py --grid 13x16x32 --sparsity 0.7

The rules: block means, as the paper has them and as `rainfusion` plans; the same with a query block's own
key block always kept; sub-blocks (log-sum-exp over the means of 4 x 4 parts of both blocks); and the blocks
that hold most of the mass, which no rule can beat. Needs the `demo` extra, no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import pairwise

import numpy as np

import rainfusion
from rainfusion.core.layout import TokenLayout
from rainfusion.core.ops import block_mean, select
from rainfusion.core.windows import Sizes
from rainfusion.demo import decode, features
from rainfusion.demo.metrics import block_mass, block_scores, recall

CLIPS = ("bikes", "bigbuckbunny", "carphone")
BLOCK, PARTS = 128, 4

Rule = Callable[[np.ndarray, np.ndarray, TokenLayout, float], np.ndarray]


def main() -> None:
    args = arguments()
    grid: Sizes = tuple(int(n) for n in args.grid.split("x"))  # type: ignore[assignment]
    layout = TokenLayout(grid, block=BLOCK)
    length = layout.length or 0
    rows, columns = layout.axis(length, 0), layout.axis(length, 1)
    print(f"grid {args.grid}, block {BLOCK}, {args.sparsity:.0%} skipped; recall, mean of the heads")
    print(f"{'':>13} " + " ".join(f"{name:>11}" for name in RULES))
    for clip in CLIPS:
        q, k, _ = features.qkv(decode.load(clip, grid), grid)
        scale = q.shape[3] ** -0.5
        mass = block_mass(q, k, layout, scale)
        shares = []
        for rule in RULES.values():
            quotas = rainfusion.TopK(args.sparsity).budget(rows, columns, q.shape[1]).quotas
            mask = select(rule(q, k, layout, scale), quotas, q=rows, kv=columns)
            shares.append(recall(mass, mask, rows.counts).mean())
        print(f"{clip:>13} " + " ".join(f"{share:>11.3f}" for share in shares), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--grid", default="21x16x32")
    parser.add_argument("--sparsity", type=float, default=0.8)
    return parser.parse_args()


def own_block(q: np.ndarray, k: np.ndarray, layout: TokenLayout, scale: float) -> np.ndarray:
    """Scores of block means, a block's own key block before all others."""
    scores = block_scores(q, k, layout, scale).copy()
    diagonal = np.arange(scores.shape[-1])
    scores[..., diagonal, diagonal] = np.inf
    return scores


def sub_blocks(q: np.ndarray, k: np.ndarray, layout: TokenLayout, scale: float) -> np.ndarray:
    """Log-sum-exp of the scores between the parts of two blocks; a ragged last block has fewer parts."""
    means = (block_mean(x, layout.order, block=BLOCK // PARTS) for x in (q, k))
    queries, keys = means
    fine = (queries @ np.swapaxes(keys, -1, -2)) * scale
    starts = np.arange(0, fine.shape[-1], PARTS)
    peaks = np.maximum.reduceat(np.maximum.reduceat(fine, starts, axis=-1), starts, axis=-2)
    sizes = [b - a for a, b in pairwise([*starts, fine.shape[-1]])]
    spread = np.repeat(np.repeat(peaks, sizes, axis=-1), sizes, axis=-2)
    return peaks + np.log(np.add.reduceat(np.add.reduceat(np.exp(fine - spread), starts, axis=-1), starts, axis=-2))


RULES: dict[str, Rule] = {
    "block means": block_scores,
    "+ own block": own_block,
    "sub-blocks": sub_blocks,
    "the best": block_mass,
}


if __name__ == "__main__":
    main()
