"""What the tests of diffusers share."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from rainfusion.integrations.diffusers import adapter


@pytest.fixture
def as_pipelines_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No gradients; and the backend that diffusers' `set_attention_backend` sets for the whole process is set back."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    with torch.no_grad():
        yield


@pytest.fixture
def own_adapters() -> Iterator[None]:
    """Adapters that a test registers are forgotten after it."""
    adapter.known()
    with mock.patch.dict(adapter._ADAPTERS), mock.patch.dict(adapter._LEFT_ALONE):
        yield
