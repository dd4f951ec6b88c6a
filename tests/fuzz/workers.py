"""A run of the fuzzer in several processes, each with its share of the seeds; one that crashes is started again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.run import State

DEVICE_LOST = 3
"""The status of a process whose device no longer answers: another one has to go on."""

_IN_ORDER = (0, 1, 2)  # statuses of a process that ended by itself
_RESTARTS = 20  # of one worker; beyond, something else is wrong than single problems
_GRACE = 60.0  # seconds that a problem may take beyond the time of the run
_TICK = 2.0


@dataclass
class Worker:
    """One process, or one after the other, on one share of the seeds.

    Attributes:
        arguments: of `python -m tests.fuzz`, without its state and how long to run, which depends on when it starts.
        problems: how many this worker is to run.
    """

    arguments: Sequence[str]
    state: Path
    problems: int
    starts: int = 0
    last: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self, minutes: float) -> None:
        """Start a process for what is left."""
        self.last = self.last or self.done() + self.problems
        command = [sys.executable, "-m", "tests.fuzz", *self.arguments]
        command += [
            "--state",
            str(self.state),
            "--problems",
            str(self.last - self.done()),
            "--minutes",
            f"{minutes:.3f}",
        ]
        # One thread each: problems are small, and there are as many processes as the machine bears.
        self.process = subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", **os.environ})
        self.starts += 1

    def goes_on(self, minutes: float) -> bool:
        """Whether it runs; a process that crashed, or whose device was lost, is followed by another."""
        assert self.process is not None
        status = self.process.poll()
        if status is None:
            return True
        if minutes <= 0 or self.starts > _RESTARTS or (status in _IN_ORDER and not self.crashed()):
            return False
        self.start(minutes)
        return True

    def done(self) -> int:
        """Problems it has run, in earlier runs of the same state too."""
        return State.read(self.state).problems if self.state.exists() else 0

    def crashed(self) -> bool:
        """Whether the process ended within a problem."""
        return self.state.exists() and State.was_running(self.state)

    def stop(self) -> int:
        """End the process if it is still within a problem, whose seed its state names; its status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.kill()
        return self.process.wait()


def run(workers: Sequence[Worker], minutes: float, tell: Callable[[], None]) -> bool:
    """Run all workers until they are done or the time is over.

    Args:
        tell: called every few seconds, to show and record how far the run is.

    Returns:
        whether every worker could run at all.
    """
    end = time.monotonic() + 60 * minutes
    for worker in workers:
        worker.start(minutes)
    try:
        while time.monotonic() < end + _GRACE:
            left = (end - time.monotonic()) / 60
            going = [worker.goes_on(left) for worker in workers]
            if not any(going):
                break
            time.sleep(_TICK)
            tell()
    finally:
        statuses = [worker.stop() for worker in workers]
        tell()
    return all(worker.state.exists() and status != 2 for worker, status in zip(workers, statuses, strict=True))
