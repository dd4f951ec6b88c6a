"""Without a CUDA device the kernels of the Triton backend run in Triton's interpreter, on the CPU.

Triton decides that when a kernel is defined, so the kernels are imported here, before any test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def interpreter() -> Iterator[None]:
    """Kernels defined and run within are interpreted, unless there is a CUDA device."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        yield


with interpreter():
    import rainfusion.backends.triton.backend  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreter():
        yield
