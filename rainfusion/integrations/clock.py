"""The clock of a pipeline: the denoising step of every forward, for all its models and contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Reading:
    """What a host knows when a forward begins.

    Args:
        context: which of the forwards of a step this is, such as ``"cond"``; None where the host does not say.
        step: the denoising step, from 0; None where the host does not say.
        steps: denoising steps of the run; None where the host does not say.
        timestep: reads the noise level that the model is given, in any unit that rises or falls through a run. It is
            called only where the schedule depends on the step, and may wait for the device.
    """

    context: str | None = None
    step: int | None = None
    steps: int | None = None
    timestep: Callable[[], float] | None = None


class Moment(NamedTuple):
    """When a forward takes place: the run, its denoising step from 0, the number of steps or None, the context."""

    run: int
    step: int
    steps: int | None
    context: str


class Clock:
    """Counts runs and denoising steps. One clock serves all models of a pipeline, such as two experts of one run.

    The step is what the host says. Where it says nothing, a step is a change of the noise level, and a change in the
    other direction starts a run. Where neither is there, forwards of a context are counted.
    """

    def __init__(self) -> None:
        self._run = 0
        self._forget()

    def _forget(self) -> None:
        self._step = -1
        self._level: float | None = None
        self._direction = 0.0
        self._counts: dict[str, int] = {}

    def reset(self) -> None:
        """The run is over."""
        if self._step >= 0:
            self._run += 1
            self._forget()

    def tick(self, reading: Reading, *, needs_step: bool) -> Moment:
        """A forward begins.

        Args:
            needs_step: whether the step matters enough to wait for the device.
        """
        context = reading.context or ""
        if reading.step is not None:
            self._said(reading.step)
        elif needs_step and reading.timestep is not None:
            self._by_level(reading.timestep())
        else:
            self._step = self._counts[context] = self._counts.get(context, -1) + 1
        return Moment(self._run, self._step, reading.steps, context)

    def _said(self, step: int) -> None:
        if step < self._step:
            self.reset()
        self._step = step

    def _by_level(self, level: float) -> None:
        change = 0.0 if self._level is None else level - self._level
        if change * self._direction < 0:
            self.reset()
            change = 0.0
        if self._level is None:
            self._step = 0
        elif change:
            self._step += 1
            self._direction = change
        self._level = level
