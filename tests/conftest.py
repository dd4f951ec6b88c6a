"""What all tests share: settings of hypothesis, and the oracle every attention is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["rainfusion.testing.pytest_plugin", "tests.installed", "tests.distributed.workers"]

# Derandomised: a run tells about the code, not about the day. No deadline: machines differ.
settings.register_profile(
    "rainfusion",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("rainfusion")

# What `make check` runs: the plan, its lowering, selection, and every argument of the public functions.
QUICK = {"test_plan.py", "test_lowering.py", "test_select.py", "test_arguments.py", "test_choice.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `QUICK`."""
    for item in items:
        if item.path.name in QUICK:
            item.add_marker(pytest.mark.quick)


Attention = Callable[..., tuple[np.ndarray, np.ndarray]]


def naive_attention(q: Any, k: Any, v: Any, dense: Any, scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Masked attention in float64, the whole logit matrix at once: output and log-sum-exp.

    `dense` is a bool mask ``[batch, heads, q_len, kv_len]`` in the order of the tensors' tokens, or True.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    logits = np.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = np.where(dense, logits, -np.inf)
    peak = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - peak)
    total = weights.sum(axis=-1, keepdims=True)
    # A key that is masked out contributes nothing, whatever stands in its value.
    values = np.where(np.any(dense, axis=(0, 1, 2))[..., None], v, 0.0) if np.ndim(dense) else v
    return np.einsum("bhqk,bhkd->bhqd", weights / total, values), (peak + np.log(total))[..., 0]


@pytest.fixture(scope="session")
def naive() -> Attention:
    """`naive_attention`."""
    return naive_attention


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20260)
