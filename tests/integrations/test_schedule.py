"""The schedule: dense steps and layers, shares by layer, head and step, and what has to be known."""

from __future__ import annotations

import pytest

from rainfusion.integrations.config import ConfigError, RainFusionConfig
from rainfusion.integrations.schedule import Schedule


def schedule(layers=4, **settings):
    return Schedule(RainFusionConfig(**settings), layers)


def why(made, steps, layer=0):
    return [made.decide(step, steps, layer).why for step in range(steps)]


def test_first_and_last_steps_are_dense():
    made = schedule(dense_steps=(2, 1))
    assert why(made, 5) == ["first steps", "first steps", "", "", "last steps"]
    assert why(made, 2) == ["first steps", "first steps"]
    assert why(schedule(dense_steps=(0, 2)), 1) == ["last steps"]
    assert made.decide(3, 5, 0).share == 0.8


def test_steps_past_the_end_are_last_steps():
    assert schedule(dense_steps=(0, 1)).decide(9, 5, 0).why == "last steps"


def test_the_number_of_steps_is_asked_for_only_where_it_matters():
    made = schedule(dense_steps=(1, 1))
    assert made.decide(0, None, 0).why == "first steps"
    with pytest.raises(ConfigError, match=r"dense_steps=\(1, 1\) needs the number of denoising steps.*give num_steps"):
        made.decide(1, None, 0)
    assert schedule(dense_steps=(1, 0)).decide(1, None, 0).share == 0.8


def test_dense_layers_count_from_both_ends():
    made = schedule(layers=4, dense_layers=(0, -1))
    assert [made.decide(0, None, layer).why for layer in range(4)] == ["layer", "", "", "layer"]


def test_shares_by_layer():
    made = schedule(sparsity={1: 0.5, 2: 0})
    assert [made.decide(0, None, layer).share for layer in range(4)] == [None, 0.5, None, None]
    assert made.decide(0, None, 0).why == "sparsity 0"


def test_shares_by_head():
    assert schedule(sparsity=(0.5, 0)).decide(0, None, 0).share == (0.5, 0.0)
    assert schedule(sparsity=(0, 0)).decide(0, None, 0).why == "sparsity 0"


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.5, 0.5), {1: (0.5,)}], ids=str)
def test_shares_for_another_number_of_heads_are_refused_at_the_first_step(shares):
    number = 3 if len(shares) == 3 else 1
    with pytest.raises(ConfigError, match=f"has {number} shares, one a head, and the model has 2 heads"):
        schedule(sparsity=shares, dense_steps=(3, 0)).check_heads(2)


def test_shares_by_step():
    made = schedule(sparsity=0.5, sparsity_from_step={6: 0, 2: 0.8, 4: {0: 0.9}})
    assert [made.decide(step, None, 0).share for step in range(8)] == [0.5, 0.5, 0.8, 0.8, 0.9, 0.9, None, None]
    assert made.decide(4, None, 1).share is None


@pytest.mark.parametrize(
    "settings",
    [{"dense_layers": (4,)}, {"dense_layers": (-5,)}, {"sparsity": {9: 0.5}}, {"sparsity_from_step": {1: {4: 0.5}}}],
    ids=str,
)
def test_layers_that_the_model_does_not_have_are_refused(settings):
    with pytest.raises(ConfigError, match="are named, and the model has 4, from 0 on"):
        schedule(layers=4, **settings)


@pytest.mark.parametrize(
    ("settings", "step", "steps"),
    [
        ({}, False, False),
        ({"dense_layers": (0,)}, False, False),
        ({"dense_steps": (1, 0)}, True, False),
        ({"dense_steps": (0, 1)}, True, True),
        ({"sparsity_from_step": {3: 0.5}}, True, False),
        ({"refresh_every": 2}, True, False),
        ({"share_masks": True}, True, False),
    ],
    ids=str,
)
def test_what_has_to_be_known(settings, step, steps):
    assert (schedule(**settings).needs_step, schedule(**settings).needs_steps) == (step, steps)
