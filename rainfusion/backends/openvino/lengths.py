"""Lengths of padded samples: how many tokens of every block take part."""

from __future__ import annotations

import math

import numpy as np

from rainfusion.core.layout import BlockedAxis


def counted(axis: BlockedAxis, lengths: np.ndarray | None) -> np.ndarray:
    """Tokens of every block that take part, int64 ``[B, blocks]``, or ``[1, blocks]`` for all samples alike.

    Args:
        lengths: int ``[B]``, valid tokens in block order; None where all are. Negative ones count as 0.
    """
    if lengths is None:
        return axis.counts[None]
    starts = np.arange(axis.blocks) * axis.block
    counts: np.ndarray = np.clip(lengths.astype(np.int64)[:, None] - starts, 0, axis.counts)
    return counts


def common_run(run: int, counts: np.ndarray) -> int:
    """The longest share of `run` of which every block's tokens are a multiple."""
    return math.gcd(run, *np.unique(counts).tolist())
