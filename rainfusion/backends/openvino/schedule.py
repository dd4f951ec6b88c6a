"""Which rows of the block mask share requests.

A row is one query block of one head. Rows with equally many query and key tokens can share a request
without padding; rows that attend to everything share their keys too, so several query blocks of one
head become one tall row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows with equally many query and key tokens, for one or more requests.

    Attributes:
        heads: sample and query head, ``b * heads + h``, int ``[n]``.
        query: query blocks, int ``[n, m]``; q_tokens: tokens that take part in each m of them.
        kept: key blocks to attend to, int ``[n, K]``, ascending; kv_tokens: tokens in each K of them.
        omitted: the others, int ``[n, S]``, where they count too; ``[n, 0]`` where they do not.
        at_once: how many of the n a request takes.
    """

    heads: np.ndarray
    query: np.ndarray
    q_tokens: int
    kept: np.ndarray
    kv_tokens: int
    omitted: np.ndarray
    at_once: int

    def part(self, rows: slice) -> Batch:
        """Some of the n."""
        return self._replace(
            heads=self.heads[rows], query=self.query[rows], kept=self.kept[rows], omitted=self.omitted[rows]
        )


def batches(
    mask: np.ndarray, q_counts: np.ndarray, kv_counts: np.ndarray, *, keys: int, logits: int, summary: bool = False
) -> list[Batch]:
    """Sort the rows of a mask into batches, the longest rows first so that no stream ends on a long one.

    Rows without query tokens, and rows without keys, are in none.

    Args:
        mask: bool ``[B, H, q blocks, key blocks]``.
        q_counts, kv_counts: tokens of every block that take part, int ``[B or 1, blocks]``: of each sample all blocks
            are full up to one, which may hold fewer, and those after it are empty.
        keys: key tokens a request should not exceed by taking more than one row.
        logits: query times key tokens it should not exceed by taking more than one query block.
        summary: omitted blocks count too.
    """
    rows = _Rows(mask, q_counts, kv_counts, summary)

    def batch(of: np.ndarray, at_once: int) -> Batch:
        first, q_tokens = of[:, 0], of.shape[1] * int(rows.q_tokens[of[0, 0]])
        query = of % mask.shape[2]
        return Batch(
            first // mask.shape[2],
            query,
            q_tokens,
            rows.kept(first),
            int(rows.kv_tokens[first[0]]),
            rows.omitted(first),
            at_once,
        )

    made: list[Batch] = []
    for alike in rows.alike():
        row = alike[0]
        q_tokens, tokens = int(rows.q_tokens[row]), int(rows.kv_tokens[row])
        if not q_tokens or not (tokens or (summary and rows.left_out[row])):
            continue
        if rows.left_out[row]:
            made.append(batch(alike[:, None], max(1, keys // max(1, tokens))))
        else:
            tall = max(1, logits // (tokens * q_tokens))
            heads = np.split(alike, np.flatnonzero(np.diff(alike // mask.shape[2])) + 1)
            made += [batch(of, 1) for of in _stacked([head[cut] for head in heads for cut in cuts(len(head), tall)])]
    return made


def cuts(count: int, size: int) -> Iterator[slice]:
    """``range(count)`` in slices of `size`; the last may hold fewer."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class _Rows:
    """The rows of a mask: ``(b * heads + h) * q blocks + i`` counts them.

    Attributes:
        q_tokens, kv_tokens: that take part in each, int ``[rows]``.
        left_out: key blocks with tokens that it omits, int ``[rows]``.
        kept, omitted: their columns; the latter none where omitted blocks do not count.
    """

    def __init__(self, mask: np.ndarray, q_counts: np.ndarray, kv_counts: np.ndarray, summary: bool) -> None:
        grid, samples = mask.shape[:3], np.arange(len(kv_counts))
        there = kv_counts > 0
        kept = mask if there.all() else mask & there[:, None, None]
        counts = kept.sum(axis=-1)
        last = np.maximum(there.sum(axis=-1) - 1, 0)  # the only block of a sample that may not be full
        missing = kv_counts[:, 0] - kv_counts[samples, last]
        reaches_last = kept[np.arange(grid[0]), :, :, np.broadcast_to(last, grid[:1])]
        tokens = counts * kv_counts[:, :1, None] - reaches_last * missing[:, None, None]
        self.kv_tokens = tokens.ravel()
        self.q_tokens = np.broadcast_to(q_counts[:, None], grid).ravel()
        self.left_out = (there.sum(axis=-1)[:, None, None] - counts).ravel()
        columns = mask.shape[-1]
        self.kept = _Columns(kept.reshape(-1, columns))
        omitted = ~mask & there[:, None, None] if summary else np.zeros_like(mask)
        self.omitted = _Columns(omitted.reshape(-1, columns))

    def alike(self) -> Iterator[np.ndarray]:
        """Rows that have everything alike, each run of them ascending, those with the most work first."""
        keys = (self.left_out, self.kv_tokens, self.q_tokens)
        return _runs(np.lexsort((*keys, -self.q_tokens * self.kv_tokens)), *keys)


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
