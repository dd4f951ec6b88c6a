"""Drift and error of the heads of a pipeline, measured in runs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rainfusion.core.checks import as_instance, shown
from rainfusion.integrations.config import ConfigError, RainFusionConfig
from rainfusion.integrations.diffusers.apply import apply_rainfusion
from rainfusion.integrations.drift_table import DriftProbe, DriftRow


def measure_drift(target: Any, run: Callable[[], Any], config: RainFusionConfig) -> tuple[DriftRow, ...]:
    """What it costs to use masks again, head by head and step by step.

    Every sparse call runs three times: dense, with a fresh mask, and with one of an earlier step. Its own run goes on
    with the fresh one. `drift_threshold` makes `reuse_drift` of the rows.

    Args:
        target: as for `apply_rainfusion`, without rainfusion.
        run: runs it, such as ``lambda: pipe(prompt)``; a few prompts give better figures than one.
        config: of the runs that are planned; its `refresh_every` is the age up to which masks are measured, and its
            `reuse_drift` is not looked at. Every context is measured by itself.

    Returns:
        Rows in the order in which they were measured.

    Raises:
        ConfigError: `refresh_every` is 1, `run` is no function, and as `apply_rainfusion`.
        UnknownModelError: as `apply_rainfusion`.
    """
    as_instance(config, RainFusionConfig, "config", ConfigError)
    if not callable(run):
        raise ConfigError(f"run={shown(run)} is not a function; give lambda: pipe(prompt), for example")
    if config.refresh_every == 1:
        raise ConfigError("refresh_every=1 uses no mask again; give the most steps that a mask may be used for")
    rows: list[DriftRow] = []
    with apply_rainfusion(target, config) as handle:
        for one in handle._applied:
            one.engine.probe = DriftProbe(config, one.engine.name, rows)
        run()
    return tuple(rows)
