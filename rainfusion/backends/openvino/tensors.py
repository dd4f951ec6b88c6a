"""Host memory seen as tables of tokens, and as OpenVINO tensors, without a copy."""

from __future__ import annotations

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

from rainfusion.backends.openvino.vendor import ov
from rainfusion.core.layout import BlockedAxis

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ELEMENTS = {
    np.dtype(np.float32): ov.Type.f32,
    np.dtype(np.float16): ov.Type.f16,
    BFLOAT16: ov.Type.bf16,
    np.dtype(np.int32): ov.Type.i32,
    np.dtype(np.int64): ov.Type.i64,
}


class TokenTable(NamedTuple):
    """The tokens of a tensor as entries of a table, whatever the order of its axes.

    Token t of head h of sample b is entry ``b * strides[0] + h * strides[1] + t * strides[2]``. Entries in
    between may belong to other tensors (q, k, v packed into one); nothing reads them.

    Attributes:
        memory: C-contiguous view ``[entries, D]``, or ``[entries, run * D]``.
        strides: entries from one sample, head and token to the next; from one run to the next where there are runs.
        run: consecutive tokens that an entry holds.
    """

    memory: np.ndarray
    strides: tuple[int, int, int]
    run: int = 1

    def in_runs(self, run: int) -> TokenTable:
        """The same memory as entries of many tokens, which gather faster: of `run`, or of a share of it that fits.

        Where the tokens do not lie one after the other, this is the table as it is.
        """
        run = math.gcd(run, self.memory.shape[0], *self.strides[:2])
        if self.strides[2] != 1 or run == 1:
            return self
        sample, head, _ = self.strides
        return TokenTable(self.memory.reshape(-1, run * self.memory.shape[1]), (sample // run, head // run, 1), run)

    def base(self, batch: int, heads: int, group: int = 1) -> np.ndarray:
        """Where the tokens of each query head begin, int32 ``[batch * heads]``; `group` of them share one."""
        sample, head = np.divmod(np.arange(batch * heads, dtype=np.int32), np.int32(heads))
        return sample * np.int32(self.strides[0]) + head // np.int32(group) * np.int32(self.strides[1])

    def numbers(self, tokens: np.ndarray, batch: int, heads: int) -> np.ndarray:
        """Entries of these tokens of every head, one head after the other, int32 ``[batch * heads * tokens]``."""
        return (self.base(batch, heads)[:, None] + (tokens * self.strides[2]).astype(np.int32)).ravel()


def token_table(x: np.ndarray) -> TokenTable:
    """The tokens of ``[B, H, tokens, D]``: the same memory where D is contiguous and every stride a multiple of it."""
    token = x.shape[-1] * x.itemsize
    # An axis of one may have any stride; none is as good, and never too large.
    strides = [stride if n > 1 else 0 for n, stride in zip(x.shape[:3], x.strides[:3], strict=True)]
    fits = x.strides[3] == x.itemsize or x.shape[3] == 1
    if not fits or any(stride < 0 or stride % token for stride in strides):
        return token_table(np.ascontiguousarray(x))
    first, second, third = (stride // token for stride in strides)
    count = 1 + sum((n - 1) * s for n, s in zip(x.shape[:3], (first, second, third), strict=True))
    memory = np.lib.stride_tricks.as_strided(x, (count, x.shape[3]), (token, x.itemsize))
    return TokenTable(memory, (first, second, third))


def tensor_on(array: np.ndarray) -> ov.Tensor:
    """An OpenVINO tensor on the memory of a C-contiguous array. It does not keep the array alive: the caller does."""
    # Naming the type lets 16-bit words stand for bfloat16, and takes arrays that may not be written.
    words = array.view(np.uint16) if array.dtype == BFLOAT16 else array
    return ov.Tensor(words, ov.Shape(array.shape), ELEMENTS[array.dtype])


class Side(NamedTuple):
    """A tensor, and the token at every position of the block order; None where the tokens stand in it.

    Entries that hold several tokens hold them in this order.
    """

    tokens: TokenTable
    order: np.ndarray | None


def longest_run(axis: BlockedAxis, order: np.ndarray | None) -> int:
    """The most tokens that an entry can hold so that each lies in one block, in the order of the blocks."""
    if order is None:
        return math.gcd(axis.block, axis.length)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(order) != 1) + 1])
    return int(np.gcd.reduce([axis.block, axis.length, *starts, *order[starts]]))


class BlockNumbers:
    """Which entries of a table hold the tokens of blocks, for one side of the attention matrix.

    Args:
        side: the tensor whose entries are named.
        axis: how its tokens are cut into blocks.
        base: as `TokenTable.base`.
    """

    def __init__(self, side: Side, axis: BlockedAxis, base: np.ndarray) -> None:
        table, order = side
        places = (np.arange(axis.length) if order is None else order)[:: table.run] // table.run
        padded = np.pad(places, (0, axis.blocks * axis.block // table.run - len(places)), mode="edge")
        blocks = (padded * table.strides[2]).astype(np.int32).reshape(axis.blocks, -1)
        self._numbers = base[:, None, None] + blocks
        self._run = table.run

    def __call__(self, heads: np.ndarray, blocks: np.ndarray, tokens: int) -> np.ndarray:
        """Numbers int32 ``[n, tokens / run]`` of the first `tokens` tokens of ``blocks[i]`` of ``heads[i]``.

        Args:
            heads: int ``[n]``.
            blocks: ascending, int ``[n, m]``.
            tokens: fewer than m blocks hold where the last of them is not full; a multiple of the run.
        """
        numbers: np.ndarray = self._numbers[heads[:, None], blocks].reshape(len(heads), -1)
        return np.ascontiguousarray(numbers[:, : tokens // self._run])
