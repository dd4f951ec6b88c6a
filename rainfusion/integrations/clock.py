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
        mark: an object that is another one in every run; None where the host has none.
    """

    context: str | None = None
    step: int | None = None
    steps: int | None = None
    timestep: Callable[[], float] | None = None
    mark: object = None


class Moment(NamedTuple):
    """When a forward takes place: the run, its denoising step from 0, the number of steps or None, the context."""

    run: int
    step: int
    steps: int | None
    context: str


class Clock:
    """Counts runs and denoising steps. One clock serves all models of a pipeline, such as two experts of one run.

    The step is what the host says, as long as that moves with the noise level. Where the host says nothing, a step is a
    change of the noise level, and a change in the other direction starts a run. Where the step does not matter enough
    to read the level, or there is none, forwards of a context are counted.
    """

    def __init__(self) -> None:
        self._run = 0
        self._mark: object = None
        self._host = _HostStep()
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
        if reading.mark is not None and reading.mark is not self._mark:
            self.reset()
            self._mark, self._host = reading.mark, _HostStep()
        context, steps = reading.context or "", reading.steps
        if reading.step is not None and self._host.moves(reading, may_wait=needs_step):
            self._said(reading.step)
            self._level = None
        elif needs_step and reading.timestep is not None:
            if self._level is None and reading.step is None:
                self.reset()  # the host said the step so far: another pipeline's run
            elif self._level is None and self._step >= 0:
                self._level = self._host.level  # of the forward after which the host's step stood still
            self._by_level(reading.timestep())
            steps = steps if reading.step is None else None
        else:
            self._step = self._counts[context] = self._counts.get(context, -1) + 1
        return Moment(self._run, self._step, steps, context)

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


class _HostStep:
    """Tells whether the step that a host says moves with the noise level.

    It does not where another pipeline runs than the one that is asked. The level is read only where a context comes
    again at one step.

    Attributes:
        level: of the first forward at the step, where it was read.
    """

    def __init__(self) -> None:
        self._last: int | None = None
        self._contexts: set[str | None] = set()
        self._first: Callable[[], float] | None = None
        self._stands = False
        self.level: float | None = None

    def moves(self, reading: Reading, *, may_wait: bool) -> bool:
        """Whether the step of a reading can be believed."""
        if reading.step != self._last:
            self._last, self._contexts = reading.step, {reading.context}
            self._first, self._stands = reading.timestep, False
            return True
        is_repeated = reading.context in self._contexts
        self._contexts.add(reading.context)
        if is_repeated and may_wait and reading.timestep is not None and self._first is not None:
            self.level = self._first()
            self._stands = self._stands or reading.timestep() != self.level
        return not self._stands
