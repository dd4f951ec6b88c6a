"""The `block_mean` operation: gather the tokens of some blocks, in float32, and average them; on all cores at once.

Token order, tensor layout, a ragged last block and padding are in the numbers of the gathered tokens, so no reordered
copy of a tensor is made. What a request gathers and converts stays near its core.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from rainfusion.backends.openvino.copies import converted
from rainfusion.backends.openvino.lengths import common_run, counted
from rainfusion.backends.openvino.processes import per_process
from rainfusion.backends.openvino.row_model import gathered
from rainfusion.backends.openvino.runtime import Arrays, Requests, parallel_streams
from rainfusion.backends.openvino.schedule import cuts
from rainfusion.backends.openvino.tensors import ELEMENTS, BlockNumbers, Side, TokenTable, longest_run, token_table
from rainfusion.backends.openvino.vendor import op, ov
from rainfusion.core.backend import Device
from rainfusion.core.layout import BlockedAxis

# In float32, where every core has its share. Smaller requests are slower for their number, larger ones leave the cache.
_GATHERED_BYTES = 2**22


class BlockMeans:
    """Means of the blocks of a tensor.

    Args:
        axis: how its tokens are cut into blocks.
        order: the token at every position of the block order; None where they stand in it.
        device: where to compute.
    """

    def __init__(self, axis: BlockedAxis, order: np.ndarray | None, device: Device) -> None:
        self._axis, self._order, self._device = axis, order, device
        self._run = longest_run(axis, order)
        self._numbered = lru_cache(maxsize=8)(self._block_numbers)  # a denoiser's tensors are laid out alike

    def __call__(self, x: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        """Of ``[B, H, tokens, D]``: float32 ``[B, H, blocks, D]``.

        Args:
            lengths: int ``[B]``; tokens at positions at or beyond it do not count, and a block without any has mean 0.
        """
        batch, heads, _, head_dim = x.shape
        if x.dtype == np.float16:  # the plugin would convert whole tables, in every request
            x = converted(x, np.dtype(np.float32), self._device)
        counts = counted(self._axis, lengths)
        table = token_table(x).in_runs(common_run(self._run, counts))
        numbers = self._numbered(table.strides, table.run, batch, heads)
        means = np.empty((batch, heads, self._axis.blocks, head_dim), np.float32)
        last = np.empty((batch, heads, head_dim), np.float32)  # of blocks that are not full, for requests write in rows
        work = self._work(numbers, np.broadcast_to(counts, (batch, self._axis.blocks)), means, last)
        _requests(head_dim, ELEMENTS[table.memory.dtype], self._device).run([table.memory], work)
        self._fill(means, last, counts)
        return means

    def _block_numbers(self, strides: tuple[int, int, int], run: int, batch: int, heads: int) -> BlockNumbers:
        table = TokenTable(np.empty((0, 0)), strides, run)
        return BlockNumbers(Side(table, self._order), self._axis, table.base(batch, heads))

    def _work(
        self, numbers: BlockNumbers, counts: np.ndarray, means: np.ndarray, last: np.ndarray
    ) -> Iterator[tuple[Arrays, Arrays]]:
        """Numbers of the tokens of n blocks, and where their means go: full ones of a head, or one each of several."""
        batch, heads, blocks, head_dim = means.shape
        share = batch * heads * blocks // (2 * parallel_streams(self._device))
        at_once = max(1, min(share, _GATHERED_BYTES // (4 * self._axis.block * head_dim)))
        for b in range(batch):
            full, rest = self._full_and_rest(counts[b])
            if rest:
                for cut in cuts(heads, at_once):
                    of = b * heads + np.arange(cut.start, cut.stop)
                    yield [numbers(of, np.full((len(of), 1), full), rest)], [last[b, cut]]
            for head in range(heads):
                for cut in cuts(full, at_once):
                    chosen = np.arange(cut.start, cut.stop)[:, None]
                    of = np.full(len(chosen), b * heads + head)
                    yield [numbers(of, chosen, self._axis.block)], [means[b, head, cut]]

    def _fill(self, means: np.ndarray, last: np.ndarray, counts: np.ndarray) -> None:
        """Put the means of blocks that are not full into their places, and zeros where nothing counts."""
        for b in range(len(means)):
            full, rest = self._full_and_rest(counts[b if len(counts) > 1 else 0])
            if rest:
                means[b, :, full] = last[b]
            means[b, :, full + bool(rest) :] = 0

    def _full_and_rest(self, counts: np.ndarray) -> tuple[int, int]:
        """How many blocks of a sample are full, and how many tokens the one after them has."""
        return divmod(int(counts.sum()), self._axis.block)


@per_process
def _requests(head_dim: int, element: ov.Type, device: Device) -> Requests:
    """Inputs: a table ``[entries, run * D]``, numbers ``[n, tokens / run]``. Output: float32 ``[n, D]``."""
    table = op.parameter([-1, -1], element, "table")
    numbers = op.parameter([-1, -1], ov.Type.i32, "numbers")
    mean = op.reduce_mean(gathered(table, numbers, head_dim), op.constant(np.array([1])), False)
    streams = parallel_streams(device)
    return Requests(ov.Model([mean], [table, numbers], "block means"), device, ov.Type.f32, streams)
