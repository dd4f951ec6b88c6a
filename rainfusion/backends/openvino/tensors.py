"""Host memory seen as tables of token rows, and as OpenVINO tensors, without a copy."""

from __future__ import annotations

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np
import openvino as ov

from rainfusion.core.layout import BlockedAxis

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ELEMENTS = {
    np.dtype(np.float32): ov.Type.f32,
    np.dtype(np.float16): ov.Type.f16,
    BFLOAT16: ov.Type.bf16,
    np.dtype(np.int32): ov.Type.i32,
    np.dtype(bool): ov.Type.boolean,
}


class Rows(NamedTuple):
    """The tokens of a tensor as rows of a table, whatever the order of its axes.

    Token t of head h of sample b is row ``b * strides[0] + h * strides[1] + t * strides[2]``. Rows in
    between may belong to other tensors (q, k, v packed into one); nothing reads them.

    Attributes:
        table: C-contiguous view ``[rows, D]``, or ``[rows, run * D]``.
        strides: rows from one sample, head and token to the next; from one run to the next where there are runs.
        run: consecutive tokens that a row of the table holds.
    """

    table: np.ndarray
    strides: tuple[int, int, int]
    run: int = 1

    def in_runs(self, run: int) -> Rows:
        """The same memory as rows of many tokens, which gather faster: of `run`, or of a share of it that fits.

        Where the tokens do not lie one after the other, these are the rows as they are.
        """
        run = math.gcd(run, self.table.shape[0], *self.strides[:2])
        if self.strides[2] != 1 or run == 1:
            return self
        sample, head, _ = self.strides
        return Rows(self.table.reshape(-1, run * self.table.shape[1]), (sample // run, head // run, 1), run)

    def base(self, batch: int, heads: int, group: int = 1) -> np.ndarray:
        """Row at which the tokens of each query head begin, int32 ``[batch * heads]``; `group` of them share one."""
        sample, head = np.divmod(np.arange(batch * heads, dtype=np.int32), np.int32(heads))
        return sample * np.int32(self.strides[0]) + head // np.int32(group) * np.int32(self.strides[1])

    def numbers(self, tokens: np.ndarray, batch: int, heads: int) -> np.ndarray:
        """Rows of these tokens of every head, one head after the other, int32 ``[batch * heads * tokens]``."""
        return (self.base(batch, heads)[:, None] + (tokens * self.strides[2]).astype(np.int32)).ravel()


def rows_of(x: np.ndarray) -> Rows:
    """The rows of ``[B, H, tokens, D]``: the same memory where D is contiguous and every stride a multiple of it."""
    row = x.shape[-1] * x.itemsize
    # An axis of one may have any stride; none is as good, and never too large.
    strides = [stride if n > 1 else 0 for n, stride in zip(x.shape[:3], x.strides[:3], strict=True)]
    fits = x.strides[3] == x.itemsize or x.shape[3] == 1
    if not fits or any(stride < 0 or stride % row for stride in strides):
        return rows_of(np.ascontiguousarray(x))
    first, second, third = (stride // row for stride in strides)
    count = 1 + sum((n - 1) * s for n, s in zip(x.shape[:3], (first, second, third), strict=True))
    table = np.lib.stride_tricks.as_strided(x, (count, x.shape[3]), (row, x.itemsize))
    return Rows(table, (first, second, third))


def tensor_on(array: np.ndarray) -> ov.Tensor:
    """An OpenVINO tensor on the memory of a C-contiguous array. It does not keep the array alive: the caller does."""
    # Naming the type lets 16-bit words stand for bfloat16, and takes arrays that may not be written.
    words = array.view(np.uint16) if array.dtype == BFLOAT16 else array
    return ov.Tensor(words, ov.Shape(array.shape), ELEMENTS[array.dtype])


class Side(NamedTuple):
    """A tensor, and the token at every position of the block order; None where the tokens stand in it.

    Rows that hold several tokens hold them in this order.
    """

    rows: Rows
    order: np.ndarray | None


def longest_run(axis: BlockedAxis, order: np.ndarray | None) -> int:
    """The most tokens that rows can hold so that each lies in one block, in the order of the blocks."""
    if order is None:
        return math.gcd(axis.block, axis.length)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(order) != 1) + 1])
    return int(np.gcd.reduce([axis.block, axis.length, *starts, *order[starts]]))


class BlockRows:
    """Row numbers of the tokens (or runs) of blocks, for one side of the attention matrix.

    Args:
        side: the tensor whose rows are named.
        axis: how its tokens are cut into blocks.
        base: as `Rows.base`.
    """

    def __init__(self, side: Side, axis: BlockedAxis, base: np.ndarray) -> None:
        rows, order = side
        places = (np.arange(axis.length) if order is None else order)[:: rows.run] // rows.run
        padded = np.pad(places, (0, axis.blocks * axis.block // rows.run - len(places)), mode="edge")
        blocks = (padded * rows.strides[2]).astype(np.int32).reshape(axis.blocks, -1)
        self._numbers = base[:, None, None] + blocks
        self._missing = len(padded) - len(places)
        self._last = axis.blocks - 1

    def __call__(self, heads: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Row numbers int32 ``[n, tokens or runs]`` of ``blocks[i]`` of ``heads[i]``.

        Args:
            heads: int ``[n]``.
            blocks: ascending, int ``[n, m]``; the ragged block ends all of them or none.
        """
        numbers: np.ndarray = self._numbers[heads[:, None], blocks].reshape(len(heads), -1)
        if self._missing and blocks.size and blocks[0, -1] == self._last:
            return np.ascontiguousarray(numbers[:, : -self._missing])
        return numbers
