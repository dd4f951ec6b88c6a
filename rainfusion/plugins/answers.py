"""Answers: what a plugin is asked runs in a thread of its own, so that it can neither hold up nor end the program.

Ctrl-C reaches the main thread alone: whatever is raised in such a thread, KeyboardInterrupt included, is the plugin's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextvars import copy_context
from threading import Event, Thread, local
from typing import Any, Generic, TypeVar

from rainfusion.core.errors import BackendError, said

Value = TypeVar("Value")
ENVIRONMENT = "RAINFUSION_PLUGIN_SECONDS"
PATIENCE = 0.5  # seconds that a call waits for a plugin before it goes on without
LIMIT = 30.0  # seconds after which a plugin that has not answered counts as broken
_here = local()


class PluginFailed(BackendError):
    """What plugin code raised, in words; the cause is the error itself."""


class PluginLate(BackendError):
    """A plugin has not answered yet."""


def patience() -> float:
    """Seconds that a call waits for a plugin: ``RAINFUSION_PLUGIN_SECONDS``, or half a second."""
    try:
        seconds = float(os.environ.get(ENVIRONMENT) or PATIENCE)
    except ValueError:
        return PATIENCE
    return seconds if 0 < seconds < math.inf else PATIENCE


class Answer(Generic[Value]):
    """A question put to a plugin; the answer is fetched with `within`.

    Args:
        here: ask now and in this thread, as for what is known to answer.
    """

    def __init__(self, question: Callable[[], Value], *, here: bool = False) -> None:
        self._asked, self._done = time.monotonic(), Event()
        self._value: Any = None
        self._error: BaseException | None = None
        if here or getattr(_here, "answering", False):  # a plugin that asks in turn: a thread each would have no end
            self._run(question)
        else:
            run = copy_context().run
            Thread(target=run, args=(self._answer, question), name="rainfusion plugin", daemon=True).start()

    @property
    def done(self) -> bool:
        """Whether there is an answer or an error."""
        return self._done.is_set()

    @property
    def overdue(self) -> bool:
        """Whether it has taken so long that no answer is expected any more."""
        return not self.done and time.monotonic() - self._asked > LIMIT

    def wait(self, seconds: float, *, since_asked: bool = False) -> bool:
        """Wait for the answer, so many seconds from now or since the question; whether there is one."""
        spent = time.monotonic() - self._asked if since_asked else 0.0
        return self._done.wait(max(seconds - spent, 0.0))

    def within(self, seconds: float) -> Value:
        """The answer.

        Raises:
            PluginFailed: the plugin raised something.
            PluginLate: no answer within `seconds`.
        """
        if not self._done.wait(seconds):
            raise PluginLate(f"no answer within {seconds:g} s")
        if self._error is not None:
            raise PluginFailed(said(self._error)) from self._error
        value: Value = self._value
        return value

    def _answer(self, question: Callable[[], Value]) -> None:
        _here.answering = True
        self._run(question)

    def _run(self, question: Callable[[], Value]) -> None:
        try:
            self._value = question()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not getattr(_here, "answering", False):
                raise  # the user's
            self._error = error
        finally:
            self._done.set()
