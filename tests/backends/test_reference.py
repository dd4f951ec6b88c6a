"""The reference backend: memory within what it says of itself."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rainfusion


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 9), ("float64", 9), ("float16", 9), (ml_dtypes.bfloat16, 12)], ids=str
)
@pytest.mark.parametrize("settings", [{"grid": (8, 16, 16)}, {"grid": (8, 16, 16), "omitted": "summary"}, {}], ids=str)
def test_memory_is_what_the_reference_says(dtype: Any, most: int, settings: dict[str, Any]) -> None:
    """In tensors of the size of q in the dtype that is computed in."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 2048, 64)).astype(dtype) for _ in range(3))

    def call() -> None:
        rainfusion.attention(q, k, v, block=64, sparsity=0.5, sink=None, backend="reference", **settings)

    call()  # plans
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most / 3 < peak / (q.size * (8 if dtype == "float64" else 4)) < most
