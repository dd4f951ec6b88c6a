"""Runs that go through `apply_rainfusion`, as a user's would: budgets a head by calibration, and masks used again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quality import model as video
from rainfusion.integrations.diffusers import Calibration, RainFusionConfig, apply_rainfusion, calibrate

if TYPE_CHECKING:
    from quality.groups import Run
    from quality.measure import Bench

_calibrations: dict[tuple[Any, ...], Calibration] = {}


def denoised(bench: Bench, run: Run) -> tuple[Tensor, dict[str, Any]]:
    """The videos of a run, and what its report says."""
    settings = dict(run.config or {})
    calibrated = settings.pop("calibrated", False)
    base = RainFusionConfig(
        sparsity=run.share,
        dense_steps=run.dense_steps,
        num_steps=bench.steps,
        min_blocks=0,
        **{"block": 128, **run.rule.settings},
        **settings,
    )
    found: dict[str, Any] = {}
    if calibrated:
        calibration = _calibration(bench, base)
        table = calibration.tables[0]
        found["predicted"] = table.predicted(calibration.budget(run.share).models[0].shares)
        base = replace(base, sparsity=calibration.budget(run.share))
    handle = apply_rainfusion(bench.model, base)
    try:
        outputs = video.denoise(bench.model, bench.asked, bench.noise, steps=bench.steps)
        report = handle.report()
    finally:
        handle.remove()
    return outputs, found | {"density": report.density, "reused": report.reused}


def _calibration(bench: Bench, config: RainFusionConfig) -> Calibration:
    """Of other scenes than those that are measured; one for all shares."""
    key = (config.sink, config.omitted, config.window, config.block)
    if key not in _calibrations:
        asked, noise = bench.tuning
        _calibrations[key] = calibrate(
            bench.model,
            [None],
            config=config,
            shares=(0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
            run=lambda _: video.denoise(bench.model, asked, noise, steps=bench.steps),
            progress=False,
        )
        print(_calibrations[key].summary(), flush=True)
    return _calibrations[key]
