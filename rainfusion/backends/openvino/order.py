"""Rows of a table in another order, by all cores at once.

Keys and values are put into block order before anything attends to them: each block is gathered many times, and a block
that lies in one piece is gathered at half the price of its tokens.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import openvino as ov
from openvino import opset13 as op

from rainfusion.backends.openvino.memory import POOL
from rainfusion.backends.openvino.runtime import Requests, compiled
from rainfusion.backends.openvino.tensors import ELEMENTS, Rows
from rainfusion.core.backend import Device


def reorder(table: np.ndarray, numbers: np.ndarray, out: np.ndarray, device: Device) -> None:
    """``out[i] = table[numbers[i]]`` for tables ``[rows, D]``."""
    _requests(table.shape[1], ELEMENTS[table.dtype], device).run((), [((table, numbers), (out,))])


def in_block_order(rows: Rows, order: np.ndarray, batch: int, heads: int, device: Device) -> Rows:
    """The tokens of every head, one after the other in `order`; a copy."""
    numbers = rows.numbers(order, batch, heads)
    ordered = POOL.array((numbers.size, rows.table.shape[1]), rows.table.dtype)
    reorder(rows.table, numbers, ordered, device)
    return Rows(ordered, (heads * len(order), len(order), 1))


@cache
def _requests(head_dim: int, element: ov.Type, device: Device) -> Requests:
    table = op.parameter([-1, head_dim], element, "table")
    numbers = op.parameter([-1], ov.Type.i32, "numbers")
    gathered = op.gather(table, numbers, op.constant(np.int64(0)))
    return Requests(compiled(ov.Model([gathered], [table, numbers], "token order"), device, element, 1), 1)
