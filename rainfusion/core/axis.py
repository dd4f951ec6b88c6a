"""BlockedAxis and ProtectedRange: what a layout says about one side of the attention matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class ProtectedRange(NamedTuple):
    """Tokens that every query attends to: positions [start, stop) of the block order.

    Attributes:
        name: ``first_frame``, ``last_frame`` or ``text``, with an index (``text_0``) where there are several.
        start, stop: positions of the block order.
        rows: whether the tokens are dense as queries too; a sink of keys only is not.
    """

    name: str
    start: int
    stop: int
    rows: bool


@dataclass(frozen=True)
class BlockedAxis:
    """One side of the attention matrix, cut into blocks.

    Attributes:
        length: tokens on this side.
        block: tokens a block; the last one may be shorter.
        ordered: whether the tokens are walked through the layout's order.
        protected_from: position of the first token that is protected on this side (`length` where there is none).
    """

    length: int
    block: int
    ordered: bool
    protected_from: int

    @property
    def blocks(self) -> int:
        """Number of blocks, the ragged last one counted in."""
        return -(-self.length // self.block)

    @property
    def free_blocks(self) -> int:
        """Leading blocks that hold no protected token; the blocks after them are protected."""
        return self.blocks if self.protected_from == self.length else self.protected_from // self.block

    @property
    def counts(self) -> np.ndarray:
        """Tokens in each block, int64 ``[blocks]``."""
        counts = np.full(self.blocks, self.block, dtype=np.int64)
        counts[-1] = self.length - (self.blocks - 1) * self.block
        return counts

    @property
    def log_counts(self) -> np.ndarray:
        """Natural logarithm of the tokens in each block, float64 ``[blocks]``."""
        logs: np.ndarray = np.log(self.counts)
        return logs
