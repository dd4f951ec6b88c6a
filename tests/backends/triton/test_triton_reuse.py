"""Masks used again by drift, on Triton's kernels: interpreted, or on a CUDA device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.integrations.heads import Heads, changed, check_heads_on_their_own, tensors

pytestmark = [pytest.mark.interpreter, pytest.mark.slow]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).to(DEVICE)


@pytest.mark.skipif(DEVICE == "cuda", reason="a drift arrives a step later there")
def test_a_head_is_selected_anew_on_its_own(monkeypatch):
    check_heads_on_their_own(Heads(monkeypatch, on_device, "triton"), tensors(), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_decision_waits_for_the_device(monkeypatch):
    """A head that drifts is selected anew, one step later at the latest; the first run copies what is constant."""
    made, qkv = Heads(monkeypatch, on_device, "triton", sparsity=(0.5, 0.5, 0.25, 0.25)), tensors()
    steps = [[on_device(x) for x in step] for step in (qkv, *[changed(qkv, 1)] * 3)]
    for mode in ("default", "error"):
        made.selected.clear()
        for step, on_cuda in enumerate(steps):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                made.attend(step, *on_cuda)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert made.selected == [4, 1]
    assert made.reused()[4:] in ([0, 1, 0.75, 1], [0, 0.75, 1, 1])
