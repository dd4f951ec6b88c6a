"""The `select` operation in NumPy, some rows at a time, in threads.

For quotas, the quota-th best score of a row is a threshold, and what reaches it is kept. A share of the mass needs the
columns in order and sums that round as the definition's do: there the rows go through the definition itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from rainfusion.backends.openvino.block_scores import BlockScores
from rainfusion.backends.openvino.copies import in_shares
from rainfusion.core.axis import BlockedAxis
from rainfusion.core.backend import Device
from rainfusion.core.ops import Select

# Scores that a thread takes at once. What it makes of them then stays in the cache; fewer, and the threads wait for
# each other in Python.
_AT_ONCE = 2**18

# How much longer the definition takes than a threshold.
_MASS_COST = 32


class Selection:
    """`select`.

    Args:
        op: the operation; shape: of the mask.
        device: whose cores are used.
        score: makes the score; None where it is given.
    """

    def __init__(self, op: Select, shape: tuple[int, ...], device: Device, score: BlockScores | None) -> None:
        self.op, self._shape, self._device, self._score = op, shape, device, score
        everything = op.over == "all" or op.mass is not None
        self._columns = op.kv.blocks if everything else op.kv.free_blocks

    def __call__(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The mask, bool ``[B, H, q blocks, key blocks]``."""
        op, mask, (batch, heads) = self.op, np.ones(self._shape, bool), self._shape[:2]
        rows, free = op.q.free_blocks, op.kv.free_blocks
        if not rows or not free:
            return mask
        quotas = np.broadcast_to(values[op.quotas], (heads, rows)).ravel()
        if op.mass is None and quotas.max() <= 0:  # protection takes all of the budget, and no score is looked at
            mask[:, :, :rows, :free] = False
            return mask
        score = self._scores(values, rows)
        lengths = [None] * batch if op.lengths is None else values[op.lengths].tolist()
        for b in range(batch):
            chosen = self._sample(score[b].reshape(heads * rows, -1), quotas, lengths[b])
            mask[b, :, :rows, :free] = chosen.reshape(heads, rows, free)
        return mask

    def _sample(self, score: np.ndarray, quotas: np.ndarray, length: int | None) -> np.ndarray:
        """Unprotected columns that the rows of all heads of a sample keep, bool ``[H * rows, columns]``.

        Args:
            score: float32 ``[H * rows, columns]``; quotas: int ``[H * rows]``.
            length: valid tokens of the sample, None where all are.
        """
        count, free = len(score), self.op.kv.free_blocks
        kept, at_once = np.empty((count, free), bool), max(1, _AT_ONCE // self._columns)

        def choose(share: slice) -> None:
            for start in range(share.start, share.stop, at_once):
                rows = slice(start, min(start + at_once, share.stop))
                kept[rows] = self._chosen(score[rows], quotas[rows], length)[:, :free]

        in_shares(choose, count, score.nbytes * (1 if self.op.mass is None else _MASS_COST), self._device)
        return kept

    def _scores(self, values: Mapping[str, np.ndarray], rows: int) -> np.ndarray:
        """Of unprotected rows and the columns that are looked at, float32 ``[B, H, rows, columns]``."""
        if self._score is None:
            return values[self.op.score][:, :, :rows, : self._columns]
        return self._score(values, rows, self._columns)

    def _chosen(self, score: np.ndarray, quotas: np.ndarray, length: int | None) -> np.ndarray:
        """Columns that some rows keep, bool ``[rows, columns]``."""
        if self.op.mass is not None:
            return self._by_definition(score, quotas, length)
        ranked: np.ndarray = np.fmax(score, np.float32(-np.inf))  # NaN becomes minus infinity
        if length is not None:
            ranked[:, -(-max(length, 0) // self.op.kv.block) :] = -np.inf  # columns without tokens
        return best(ranked, quotas)

    def _by_definition(self, score: np.ndarray, quotas: np.ndarray, length: int | None) -> np.ndarray:
        op = replace(self.op, q=BlockedAxis(len(score), 1, False, len(score)))
        values = {op.score: np.ascontiguousarray(score)[None, None], op.quotas: quotas[None]}
        if op.lengths is not None:
            values[op.lengths] = np.array([length])
        kept: np.ndarray = op.evaluate(values)[op.mask][0, 0]
        return kept


def best(score: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """Exactly ``quotas[i]`` columns of row i, the highest first, ties to the lower index: bool ``[rows, columns]``.

    Args:
        score: float32 ``[rows, columns]`` without NaN; quotas: int ``[rows]``, clamped to the number of columns.
    """
    columns = score.shape[1]
    quotas = np.clip(quotas, 0, columns)[:, None]
    place = columns - np.maximum(quotas, 1)  # of the quota-th best in ascending order
    # Parting at one place is up to four times as fast as sorting, by the CPU; at several it is slower.
    alike = (place == place[0]).all()
    ordered = np.partition(score, place[0, 0], axis=-1) if alike else np.sort(score, axis=-1)
    threshold = np.take_along_axis(ordered, place, axis=-1)
    kept: np.ndarray = (score >= threshold) & (quotas > 0)
    tied = np.count_nonzero(kept, axis=-1) > quotas[:, 0]
    if tied.any():
        kept[tied] = _fewer(score[tied], threshold[tied], quotas[tied])
    return kept


def _fewer(score: np.ndarray, threshold: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """What is above the threshold, and from the lowest index as many that equal it as the quotas leave places for."""
    better, equal = score > threshold, score == threshold
    left = quotas - np.count_nonzero(better, axis=-1, keepdims=True)
    fewer: np.ndarray = better | (equal & (np.cumsum(equal, axis=-1, dtype=np.int32) <= left))
    return fewer
