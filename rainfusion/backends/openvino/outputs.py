"""Where the requests of an attention write, and the way from there back to the caller's token order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rainfusion.backends.openvino.copies import reorder
from rainfusion.backends.openvino.memory import POOL
from rainfusion.backends.openvino.runtime import Arrays
from rainfusion.backends.openvino.schedule import Batch
from rainfusion.backends.openvino.tensors import BlockNumbers, Side, TokenTable
from rainfusion.core.backend import Device
from rainfusion.core.layout import BlockedAxis


class Staged:
    """The outputs of batches, one after the other.

    Args:
        shape: of the queries, ``[B, H, q_len, D]``; q, order: how they are cut into blocks, and in which order.
        work: the batches.
        dtype: of the products.
    """

    def __init__(
        self, shape: tuple[int, ...], q: BlockedAxis, order: np.ndarray | None, work: list[Batch], dtype: np.dtype
    ) -> None:
        self._shape = batch, heads, length, head_dim = shape
        tokens = TokenTable(np.empty((0, 0)), (heads * length, length, 1))
        numbers = BlockNumbers(Side(tokens, order), q, tokens.base(batch, heads))
        self._taken = [numbers(of.heads, of.query, of.q_tokens) for of in work]
        self._starts = np.cumsum([0, *(taken.size for taken in self._taken)])
        # One token more than is written, for queries that keep nothing: output 0, log-sum-exp minus infinity.
        self._out = POOL.array((int(self._starts[-1]) + 1, head_dim), dtype)
        self._lse = np.empty(self._starts[-1] + 1, np.float32)
        self._out[-1], self._lse[-1] = 0, -np.inf

    def parts(self, lse: bool) -> Iterator[Arrays]:
        """The arrays that receive the outputs of each batch."""
        for taken, end in zip(self._taken, self._starts[1:], strict=True):
            span = slice(end - taken.size, end)
            out = self._out[span].reshape(*taken.shape, -1)
            yield [out, self._lse[span].reshape(*taken.shape, 1)] if lse else [out]

    def restored(self, device: Device, swapped: bool, lse: bool) -> list[np.ndarray]:
        """``[B, H, q_len, D]``, in memory ``[B, q_len, H, D]`` where it is swapped, and the log-sum-exp if wanted."""
        batch, heads, length, head_dim = self._shape
        place = np.full(batch * heads * length, self._starts[-1], np.int32)
        if self._taken:
            place[np.concatenate([taken.ravel() for taken in self._taken])] = np.arange(
                self._starts[-1], dtype=np.int32
            )
        shape = (batch, heads, length)
        swap = (0, 2, 1) if swapped else (0, 1, 2)
        numbers = np.ascontiguousarray(place.reshape(shape).transpose(swap))
        out = POOL.array((*numbers.shape, head_dim), self._out.dtype)
        reorder(self._out, numbers.ravel(), out.reshape(-1, head_dim), device)
        results = [out.transpose(*swap, 3)]
        return [*results, self._lse[place].reshape(shape)] if lse else results
