"""Sizes that no machine can hold are refused before memory is touched, with the number of bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rainfusion
from rainfusion import AttentionProblem, BlockMask, TokenLayout, TopK

LONG = 2**31 - 1


def huge(length: int) -> np.ndarray:
    """A tensor of one number in memory."""
    return np.broadcast_to(np.float32(0), (1, 1, length, 8))


def plan_of(length: int, block: int, heads: int = 1) -> Any:
    problem = AttentionProblem(1, heads, length, length, 8, "float32")
    return rainfusion.plan(problem, TokenLayout(block=block), TopK(0.5))


REFUSED: dict[str, Callable[[], Any]] = {
    "the order of a grid": lambda: TokenLayout((1000, 1000, 2000), block=128).order,
    "the inverse of an order": lambda: TokenLayout((500, 1000, 1000), block=128).inverse,
    "blocks of one token": lambda: plan_of(80_000_000, 1),
    "many tokens": lambda: plan_of(LONG, 128),
    "many heads": lambda: plan_of(2**20, 64, heads=2**20),
    "many columns": lambda: BlockMask.from_kv_indices(
        np.ones((1, 1, 2), np.int32), np.zeros((1, 1, 2, 1), np.int32), 2, LONG, (1, 1)
    ),
    "many entries": lambda: BlockMask(np.ones((1, 1, 1, 1), bool), LONG, LONG, (LONG, LONG)).to_dense(),
    "attention": lambda: rainfusion.attention(*[huge(2**30)] * 3, sparsity=0.5, backend="reference"),
    "selection": lambda: rainfusion.select(*[huge(2**30)] * 2, sparsity=0.5, block=1024, backend="reference"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_with_its_bytes_and_takes_no_memory(what: str) -> None:
    tracemalloc.start()
    with pytest.raises(rainfusion.RainfusionError, match=r"\d{9,} bytes"):
        REFUSED[what]()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24  # modules that are imported on the way
