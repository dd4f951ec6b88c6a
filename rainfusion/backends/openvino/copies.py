"""Copies by several cores at once: rows of a table in another order, elements of another type.

NumPy makes them: it copies rows about twice as fast as OpenVINO gathers them, and leaves Python to other threads
meanwhile, except while it widens bfloat16, whose type is not its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rainfusion.backends.openvino.memory import POOL
from rainfusion.backends.openvino.runtime import parallel_streams
from rainfusion.backends.openvino.schedule import cuts
from rainfusion.backends.openvino.tensors import TokenTable
from rainfusion.core.backend import Device

# A thread that copies less costs more than it saves; more threads than these wait for memory.
_SHARE_BYTES, _THREADS = 2**22, 8


def in_block_order(table: TokenTable, order: np.ndarray, batch: int, heads: int, device: Device) -> TokenTable:
    """The tokens of every head, one after the other in `order`; a copy."""
    numbers = table.numbers(order, batch, heads)
    ordered = POOL.array((numbers.size, table.memory.shape[1]), table.memory.dtype)
    reorder(table.memory, numbers, ordered, device)
    return TokenTable(ordered, (heads * len(order), len(order), 1))


def reorder(table: np.ndarray, numbers: np.ndarray, out: np.ndarray, device: Device) -> None:
    """``out[i] = table[numbers[i]]`` for tables ``[rows, D]``."""
    source, target = table.view(np.uint8), out.view(np.uint8)

    def copy(cut: slice) -> None:
        np.take(source, numbers[cut], axis=0, out=target[cut], mode="clip")  # which, unlike "raise", has no buffer

    in_shares(copy, len(numbers), target.nbytes, device)


def converted(x: np.ndarray, dtype: np.dtype, device: Device) -> np.ndarray:
    """``[B, H, tokens, D]`` in another type, its axes laid out as they were; itself where it has that type."""
    if x.dtype == dtype:
        return x
    made = np.empty_like(x, dtype)
    in_shares(lambda heads: np.copyto(made[:, heads], x[:, heads]), x.shape[1], made.nbytes, device)
    return made


def in_shares(work: Callable[[slice], None], count: int, size: int, device: Device) -> None:
    """Call `work` with slices of ``range(count)``, in this thread and others.

    Args:
        size: bytes that it copies, or those whose copying would take as long.
    """
    shares = min(count, _THREADS, parallel_streams(device), 1 + size // _SHARE_BYTES)
    if shares < 2:
        work(slice(0, count))
        return
    mine, *others = cuts(count, -(-count // shares))
    with ThreadPoolExecutor(len(others)) as threads:
        running = [threads.submit(work, cut) for cut in others]
        work(mine)
    for share in running:
        share.result()
