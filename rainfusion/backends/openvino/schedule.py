"""Which rows of the block mask share requests.

A row is one query block of one head. Rows with equally many query and key tokens can share a request
without padding; rows that attend to everything share their keys too, so several query blocks of one
head become one tall row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rainfusion.core.layout import BlockedAxis


class Batch(NamedTuple):
    """Rows with equally many query and key tokens, for one or more requests.

    Attributes:
        heads: sample and query head, ``b * heads + h``, int ``[n]``.
        query: query blocks, int ``[n, m]``.
        kept: key blocks to attend to, int ``[n, K]``, ascending.
        skipped: the others, int ``[n, S]``, where they count too; ``[n, 0]`` where they do not.
        at_once: how many of the n a request takes.
    """

    heads: np.ndarray
    query: np.ndarray
    kept: np.ndarray
    skipped: np.ndarray
    at_once: int

    def part(self, rows: slice) -> Batch:
        """Some of the n."""
        return Batch(self.heads[rows], self.query[rows], self.kept[rows], self.skipped[rows], self.at_once)


def batches(
    mask: np.ndarray, q: BlockedAxis, kv: BlockedAxis, *, keys: int, logits: int, summary: bool = False
) -> list[Batch]:
    """Sort the rows of a mask into batches, the longest rows first so that no stream ends on a long one.

    Args:
        mask: bool ``[B, H, q blocks, key blocks]``.
        keys: key tokens a request should not exceed by taking more than one row.
        logits: query times key tokens it should not exceed by taking more than one query block.
        summary: skipped blocks count too, so rows that keep nothing are in a batch as well.
    """
    rows = mask.reshape(-1, kv.blocks)
    counts = rows.sum(axis=-1)
    q_tokens = np.tile(q.counts, len(rows) // q.blocks)
    kv_tokens = counts * kv.block - rows[:, -1] * (kv.block - kv.counts[-1])
    kept, skipped = _Columns(rows), _Columns(~rows if summary else np.zeros_like(rows))

    def batch(of: np.ndarray, at_once: int) -> Batch:
        first = of[:, 0]
        return Batch(first // q.blocks, of % q.blocks, kept(first), skipped(first), at_once)

    made: list[Batch] = []
    longest_first = np.lexsort((kv_tokens, q_tokens, -q_tokens * kv_tokens))
    for alike in _runs(longest_first, q_tokens, kv_tokens):
        tokens = int(kv_tokens[alike[0]])
        if counts[alike[0]] == kv.blocks:
            tall = max(1, logits // (tokens * q.block))
            heads = np.split(alike, np.flatnonzero(np.diff(alike // q.blocks)) + 1)
            made += [batch(of, 1) for of in _stacked([head[cut] for head in heads for cut in cuts(len(head), tall)])]
        elif tokens or summary:
            made.append(batch(alike[:, None], max(1, keys // max(1, tokens))))
    return made


def cuts(count: int, size: int) -> Iterator[slice]:
    """``range(count)`` in slices of `size`; the last may hold fewer."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _stacked(runs: list[np.ndarray]) -> list[np.ndarray]:
    """Runs of the same length as one array ``[n, length]``, the longest first."""
    lengths = sorted({len(run) for run in runs}, reverse=True)
    return [np.stack([run for run in runs if len(run) == length]) for length in lengths]


class _Columns:
    """The true columns of rows that have equally many, int ``[n, count]``, ascending; one pass over the grid."""

    def __init__(self, grid: np.ndarray) -> None:
        self._columns = np.nonzero(grid)[1]
        self._ends = np.cumsum(grid.sum(axis=-1))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        first = rows[0]
        count = self._ends[first] - (self._ends[first - 1] if first else 0)
        columns: np.ndarray = self._columns[self._ends[rows, None] - count + np.arange(count)]
        return columns


def _runs(rows: np.ndarray, *keys: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of consecutive `rows` on which every key is constant, each in ascending order."""
    changes = np.zeros(max(len(rows) - 1, 0), dtype=bool)
    for key in keys:
        changes |= np.diff(key[rows]) != 0
    for run in np.split(rows, np.flatnonzero(changes) + 1):
        yield np.sort(run)
