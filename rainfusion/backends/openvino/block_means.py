"""The `block_mean` operation: gather the tokens of some blocks, in float32, and average them; on all cores at once.

Token order, tensor layout and a ragged last block are in the row numbers, so no reordered copy of a tensor is made.
What a request gathers and converts stays near its core.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache

import numpy as np
import openvino as ov
from openvino import opset13 as op

from rainfusion.backends.openvino.copies import converted
from rainfusion.backends.openvino.row_model import gathered
from rainfusion.backends.openvino.runtime import Arrays, Requests, parallel_streams
from rainfusion.backends.openvino.schedule import cuts
from rainfusion.backends.openvino.tensors import ELEMENTS, BlockRows, Rows, Side, longest_run, rows_of
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
        self._ragged = axis.length % axis.block > 0
        self._numbered = lru_cache(maxsize=8)(self._block_rows)  # a denoiser's tensors are laid out alike

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Of ``[B, H, tokens, D]``: float32 ``[B, H, blocks, D]``."""
        batch, heads, _, head_dim = x.shape
        if x.dtype == np.float16:  # the plugin would convert whole tables, in every request
            x = converted(x, np.dtype(np.float32), self._device)
        table, strides, run = rows_of(x).in_runs(self._run)
        rows = self._numbered(strides, run, batch, heads)
        means = np.empty((batch * heads, self._axis.blocks, head_dim), np.float32)
        last = np.empty((batch * heads, head_dim), np.float32)
        _requests(head_dim, ELEMENTS[table.dtype], self._device).run([table], self._work(rows, means, last))
        if self._ragged:
            means[:, -1] = last
        return means.reshape(batch, heads, self._axis.blocks, head_dim)

    def _block_rows(self, strides: tuple[int, int, int], run: int, batch: int, heads: int) -> BlockRows:
        rows = Rows(np.empty((0, 0)), strides, run)
        return BlockRows(Side(rows, self._order), self._axis, rows.base(batch, heads))

    def _work(self, rows: BlockRows, means: np.ndarray, last: np.ndarray) -> Iterator[tuple[Arrays, Arrays]]:
        """Row numbers of n blocks, and where their means go: the ragged block of several heads, or full ones of one."""
        heads, full = np.arange(len(means)), self._axis.blocks - self._ragged
        share = len(heads) * full // (2 * parallel_streams(self._device))
        at_once = max(1, min(share, _GATHERED_BYTES // (4 * self._axis.block * means.shape[-1])))
        if self._ragged:
            for cut in cuts(len(heads), at_once):
                yield [rows(heads[cut], np.full_like(heads[cut], full)[:, None])], [last[cut]]
        for head in heads:
            for cut in cuts(full, at_once):
                blocks = np.arange(cut.start, cut.stop)[:, None]
                yield [rows(np.full(len(blocks), head), blocks)], [means[head, cut]]


@cache
def _requests(head_dim: int, element: ov.Type, device: Device) -> Requests:
    """Inputs: a table ``[rows, run * D]``, row numbers ``[n, tokens / run]``. Output: float32 ``[n, D]``."""
    table = op.parameter([-1, -1], element, "table")
    numbers = op.parameter([-1, -1], ov.Type.i32, "numbers")
    mean = op.reduce_mean(gathered(table, numbers, head_dim), op.constant(np.array([1])), False)
    streams = parallel_streams(device)
    return Requests(ov.Model([mean], [table, numbers], "block means"), device, ov.Type.f32, streams)
