"""The clock: what the host says, what noise levels say, and counting."""

from __future__ import annotations

import pytest

from rainfusion.integrations.clock import Clock, Reading


def said(step, context=None, steps=None):
    return Reading(context, step, steps)


def at(level, context=None):
    return Reading(context, timestep=lambda: level)


def ticks(clock, readings, needs_step=True):
    return [clock.tick(reading, needs_step=needs_step) for reading in readings]


def places(moments):
    return [(moment.run, moment.step) for moment in moments]


def test_the_host_says_the_step():
    readings = [said(step, context, 3) for step in (0, 1, 2) for context in ("cond", "uncond")]
    moments = ticks(Clock(), readings)
    assert places(moments) == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (0, 2)]
    assert [moment.context for moment in moments] == ["cond", "uncond"] * 3
    assert {moment.steps for moment in moments} == {3}


def test_a_step_that_falls_starts_a_run():
    assert places(ticks(Clock(), map(said, (0, 1, 2, 0, 1, 5, 3)))) == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 5),
        (2, 3),
    ]


def test_a_reset_starts_a_run_and_a_second_one_does_not():
    clock = Clock()
    clock.reset()
    ticks(clock, [said(0)])
    clock.reset()
    clock.reset()
    assert places(ticks(clock, [said(0)])) == [(1, 0)]


@pytest.mark.parametrize("levels", [(900, 500, 100), (0.0, 0.4, 0.9)], ids=["falling", "rising"])
def test_noise_levels_that_change_are_steps_and_a_turn_is_a_run(levels):
    once = [at(level, context) for level in levels for context in ("cond", "uncond")]
    expected = [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (0, 2)]
    assert places(ticks(Clock(), once + once)) == expected + [(1, step) for _, step in expected]


def test_noise_levels_without_contexts():
    assert places(ticks(Clock(), [at(level) for level in (9, 9, 5, 5, 9, 9, 5)])) == [
        (0, 0),
        (0, 0),
        (0, 1),
        (0, 1),
        (1, 0),
        (1, 0),
        (1, 1),
    ]


def test_two_models_on_one_clock_go_on_counting():
    """The second expert of a run takes over where the first stopped."""
    clock = Clock()
    first, second = [at(level) for level in (900, 700)], [at(level) for level in (500, 300)]
    assert places(ticks(clock, first) + ticks(clock, second)) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_levels_are_not_read_where_the_step_does_not_matter_or_is_said():
    def never():
        raise AssertionError("read")

    clock = Clock()
    assert places(ticks(clock, [Reading(timestep=never)] * 2, needs_step=False)) == [(0, 0), (0, 1)]
    assert places(ticks(clock, [Reading(step=4, timestep=never)])) == [(0, 4)]


def test_forwards_of_a_context_are_counted_where_nothing_is_known():
    clock = Clock()
    readings = [Reading(context) for _ in range(3) for context in ("cond", "uncond")]
    assert places(ticks(clock, readings)) == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (0, 2)]
    clock.reset()
    assert places(ticks(clock, readings[:3])) == [(1, 0), (1, 0), (1, 1)]


def test_one_step_of_one_level_stays_one_step():
    assert places(ticks(Clock(), [at(5)] * 4)) == [(0, 0)] * 4


def test_a_step_that_stands_while_the_noise_level_changes_is_not_believed():
    """Another pipeline runs than the one whose scheduler is asked."""
    readings = [Reading(None, 0, 4, lambda level=level: level) for level in (900, 500, 100, 900, 500)]
    assert places(ticks(Clock(), readings)) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_several_forwards_of_a_step_are_believed():
    readings = [Reading(None, step, 4, lambda step=step: -step) for step in (0, 0, 1, 1, 1, 2)]
    assert places(ticks(Clock(), readings)) == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 1), (0, 2)]


def test_another_mark_is_another_run():
    marks = object(), object()
    readings = [Reading(None, 0, 4, None, mark) for mark in (marks[0], marks[0], marks[1], marks[1])]
    assert places(ticks(Clock(), readings)) == [(0, 0), (0, 0), (1, 0), (1, 0)]
