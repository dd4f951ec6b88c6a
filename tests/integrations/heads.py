"""An engine of one layer whose heads are changed one by one, and what it selects anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rainfusion
from rainfusion import Grid
from rainfusion.core.arrays import to_numpy
from rainfusion.integrations.clock import Clock, Reading
from rainfusion.integrations.config import RainFusionConfig
from rainfusion.integrations.engine import Engine
from rainfusion.integrations.report import Log, Report

Array = Any
GRID = Grid(2, 8, 8, sink=None)
BLOCK = 16


class Heads:
    """An engine of one layer, and the heads that it selects at every call.

    Args:
        like: makes the library's arrays of NumPy's.
        backend: its name.
        settings: of the configuration.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        like: Callable[[np.ndarray], Array] = np.asarray,
        backend: str = "reference",
        **settings: Any,
    ) -> None:
        defaults = {"sparsity": 0.5, "block": BLOCK, "min_blocks": 0, "sink": None, "reuse_drift": 0.1}
        self.config = RainFusionConfig(**defaults | {"refresh_every": 9, "backend": backend} | settings)
        self.log = Log(99)
        self.engine = Engine(self.config, 1, Clock(), self.log, "model")
        self.like = like
        self.selected: list[int] = []
        self.masks: list[Any] = []
        attention, select = rainfusion.attention, rainfusion.select

        def seen_attention(q: Array, k: Array, v: Array, **arguments: Any) -> Any:
            result = attention(q, k, v, **arguments)
            given = arguments.get("mask")
            if given is None:
                self.selected.append(q.shape[2])
            self.masks.append(result[1] if given is None and arguments.get("return_mask") else given)
            return result

        def seen_select(q: Array, k: Array, **arguments: Any) -> Any:
            self.selected.append(q.shape[2])
            return select(q, k, **arguments)

        monkeypatch.setattr(rainfusion, "attention", seen_attention)
        monkeypatch.setattr(rainfusion, "select", seen_select)
        self.attention, self.select = attention, select

    def forward(self, step: int, qkv: tuple[np.ndarray, ...], context: str | None = None, **call: Any) -> np.ndarray:
        """A forward: the output of the layer."""
        return to_numpy(self.attend(step, *map(self.like, qkv), context=context, **call))

    def attend(self, step: int, *qkv: Array, context: str | None = None, **call: Any) -> Array:
        """The same with the library's arrays."""
        self.engine.begin(Reading(context, step), (GRID,))
        out = self.engine.attend(0, *qkv, lambda: pytest.fail("dense"), **call)
        self.engine.end()
        return out

    def settings(self, **other: Any) -> dict[str, Any]:
        """What `rainfusion.attention` is told by the engine."""
        config = self.config
        return {
            "parts": (GRID,),
            "block": config.block,
            "omitted": config.omitted,
            "tensor_layout": "bshd",
            "backend": config.backend,
            **other,
        }

    def mask_of(self, qkv: tuple[np.ndarray, ...], **call: Any) -> np.ndarray:
        """The mask that a call of all heads selects, as a grid."""
        q, k = map(self.like, qkv[:2])
        return to_numpy(self.select(q, k, sparsity=self.config.sparsity, **self.settings(**call)).blocks)

    def used(self) -> np.ndarray:
        """The mask of the last call, as a grid."""
        return to_numpy(self.masks[-1].blocks)

    def reused(self) -> list[float]:
        """Share of the heads that used a mask again, call by call."""
        return [row.reused for row in self.log.rows()]

    def report(self) -> Report:
        """The report."""
        return Report(self.config, {"model": 1}, self.log.rows())


def tensors(heads: int = 4, kv_heads: int | None = None, batch: int = 1, seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k and v, ``[batch, tokens, heads, 8]``."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, GRID.count, n, 8) for n in (heads, kv_heads or heads, kv_heads or heads)]
    return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)


def changed(qkv: tuple[np.ndarray, ...], *heads: int, what: int = 0, sample: int | slice = slice(None), seed: int = 9):
    """The same with other queries (`what` 0) or keys (1) of some heads."""
    arrays = [x.copy() for x in qkv]
    rng = np.random.default_rng(seed)
    for head in heads:
        part = arrays[what][sample, :, head]
        arrays[what][sample, :, head] = rng.standard_normal(part.shape, dtype=np.float32)
    return tuple(arrays)


def check_heads_on_their_own(made: Heads, qkv: tuple[np.ndarray, ...], tolerance: float) -> None:
    """One head changes: it alone is selected anew, and has the output of a fresh mask; the others have the old one."""
    made.forward(0, qkv)
    moved = changed(qkv, 1)
    out = made.forward(1, moved)
    assert made.selected == [qkv[0].shape[2], 1]
    old, fresh = made.mask_of(qkv), made.mask_of(moved)
    expected = old.copy()
    expected[:, 1] = fresh[:, 1]
    assert (fresh[:, 1] != old[:, 1]).any()
    np.testing.assert_array_equal(made.used(), expected)
    always = to_numpy(made.attention(*map(made.like, moved), sparsity=made.config.sparsity, **made.settings()))
    np.testing.assert_allclose(out[:, :, 1], always[:, :, 1], atol=tolerance, rtol=tolerance)
    mask = rainfusion.BlockMask(made.like(old), GRID.count, GRID.count, (BLOCK, BLOCK))
    stale = to_numpy(made.attention(*map(made.like, moved), mask=mask, **made.settings()))
    np.testing.assert_allclose(out[:, :, [0, 2, 3]], stale[:, :, [0, 2, 3]], atol=tolerance, rtol=tolerance)
    made.forward(2, moved)
    assert made.selected == [qkv[0].shape[2], 1]
    np.testing.assert_array_equal(made.used(), expected)
    assert made.reused() == [0, 0.75, 1]
