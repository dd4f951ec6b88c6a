"""Masks used again by drift in pipelines of diffusers, and the limit of drift measured in them."""

from __future__ import annotations

import pytest
import torch

from rainfusion.integrations.diffusers import ConfigError, apply_rainfusion, drift_threshold, measure_drift
from tests.integrations.diffusers.pipelines import LAYERS, inputs, kinds, run, settings, wan, wan_pipeline

pytestmark = pytest.mark.usefixtures("as_pipelines_run")
STEPS = 5


def test_a_limit_of_drift_lies_between_always_fresh_and_age_alone():
    """Without a limit, masks are as old as they may be; with none at all every mask is fresh, to the bit."""
    latents, shares = {}, {}
    for limit in (0.0, 0.6, 99.0, None):
        pipe = wan_pipeline()
        handle = apply_rainfusion(pipe, settings(refresh_every=9, reuse_drift=limit))
        latents[limit], shares[limit] = run(pipe, STEPS), handle.report().reused
    pipe = wan_pipeline()
    apply_rainfusion(pipe, settings())
    assert torch.equal(latents[0.0], run(pipe, STEPS))
    assert torch.equal(latents[99.0], latents[None])
    assert shares[0.0] == 0 < shares[0.6] < shares[None] == shares[99.0] == pytest.approx(1 - 1 / STEPS)


def test_masks_are_used_again_in_both_contexts_and_by_what_they_share():
    pipe = wan_pipeline()
    handle = apply_rainfusion(pipe, settings(refresh_every=9, reuse_drift=99.0, share_masks=True))
    run(pipe, STEPS)
    assert kinds(handle.report(), context="cond") == ["sparse"] + ["reused"] * (STEPS - 1)
    assert kinds(handle.report(), context="uncond") == ["reused"] * STEPS


@pytest.mark.parametrize("share_masks", [False, True])
def test_drift_is_measured_in_a_run_that_it_does_not_change(share_masks):
    pipe = wan_pipeline()
    config = settings(refresh_every=3, share_masks=share_masks, dense_steps=(1, 0))
    latents = []
    rows = measure_drift(pipe, lambda: latents.append(run(pipe, STEPS)), config)
    assert [(row.step, row.age) for row in rows if (row.layer, row.head, row.context) == (1, 0, "uncond")] == [
        (2, 1),
        (3, 2),
    ]
    assert len(rows) == 2 * 2 * LAYERS * 2
    assert all(0 < row.drift < 9 and row.fresh_error > 0 for row in rows)
    assert 0 <= drift_threshold(rows) <= max(row.drift for row in rows)
    with apply_rainfusion(pipe, settings(dense_steps=(1, 0))):
        assert torch.equal(run(pipe, STEPS), latents[0])


def test_drift_needs_steps_between():
    with pytest.raises(ConfigError, match="refresh_every=1 uses no mask again"):
        measure_drift(wan(), list, settings())


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="config=None is a NoneType; give a RainFusionConfig"):
        measure_drift(wan(), list, None)
    with pytest.raises(ConfigError, match="run='a cat' is not a function"):
        measure_drift(wan(), "a cat", settings(refresh_every=2))


def test_a_handle_that_is_kept_for_its_report_keeps_no_masks():
    model = wan()
    handle = apply_rainfusion(model, settings(refresh_every=3))
    model(**inputs())
    engine = handle._applied[0].engine
    assert len(engine._masks) == LAYERS
    handle.remove()
    assert len(engine._masks) == 0
    assert handle.report().count(kind="sparse") == LAYERS


def test_a_measurement_that_fails_leaves_nothing_behind():
    pipe = wan_pipeline()
    with pytest.raises(ZeroDivisionError):
        measure_drift(pipe, lambda: 1 / 0, settings(refresh_every=2))
    apply_rainfusion(pipe, settings())
