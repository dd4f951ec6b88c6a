"""Questions put to plugins in processes of their own, so that a stack that ends the interpreter ends only that one.

As a program (``python -m rainfusion.plugins.apart``) it answers one question. The answer goes into a file that the
asking process names; whatever plugin code prints is neither shown nor read as an answer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rainfusion.core.errors import BackendError, readable

ENVIRONMENT = "RAINFUSION_PROBE_SECONDS"
_SECONDS = 60.0
_AT_ONCE = 4
_LAST_WORDS = 4096  # bytes of what a process wrote to stderr that are read


class Apart:
    """One question in a process of its own, from the moment it is made.

    Args:
        question: what `main` is asked, plain JSON values.
    """

    def __init__(self, question: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rainfusion-", ignore_cleanup_errors=True)
        self._answer, self._stderr = Path(self._folder.name) / "answer", Path(self._folder.name) / "stderr"
        self._until = time.monotonic() + seconds()
        command = [sys.executable, "-m", "rainfusion.plugins.apart", str(self._answer), *question]
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )

    @property
    def done(self) -> bool:
        """Whether the process has ended, or has taken too long."""
        return self._process.poll() is not None or time.monotonic() > self._until

    def result(self) -> Any:
        """The answer.

        Raises:
            BackendError: there is none, and why.
        """
        status = self._process.poll()
        if status is None:
            raise BackendError(f"no answer within {seconds():g} s ({ENVIRONMENT} sets another limit)")
        try:
            return json.loads(self._answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise BackendError(f"the probing process ended with status {status}: {self._last_words()}") from None

    def end(self) -> None:
        """End the process and what it has started."""
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, 9)
            else:
                self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def _last_words(self) -> str:
        with suppress(OSError), self._stderr.open("rb") as file:
            file.seek(max(self._stderr.stat().st_size - _LAST_WORDS, 0))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
            if lines:
                return readable(lines[-1])
        return "it printed nothing"


def ask_all(questions: Sequence[Sequence[str]]) -> Iterator[Callable[[], Any]]:
    """Put every question in a process of its own, a few at a time; yields a function for each that gives its answer.

    An interrupt, or the end of the iteration, ends all that are running.
    """
    waiting, running = list(questions), list[Apart]()
    asked: list[Apart] = []
    try:
        for number in range(len(questions)):
            while True:
                running = [apart for apart in running if not apart.done]
                while waiting and len(running) < _AT_ONCE:
                    asked.append(Apart(waiting.pop(0)))
                    running.append(asked[-1])
                if number < len(asked) and asked[number].done:
                    break
                time.sleep(0.01)
            yield asked[number].result
    finally:
        for apart in asked:
            apart.end()


def seconds() -> float:
    """How long a process may take to answer: ``RAINFUSION_PROBE_SECONDS``, or a minute."""
    with suppress(ValueError):
        given = float(os.environ.get(ENVIRONMENT) or _SECONDS)
        if 0 < given < 1e9:
            return given
    return _SECONDS


def main(answer: str, plugin: str, backend: str | None = None) -> None:
    """Ask a plugin for its backends, or a backend of it for its devices, and write the answer.

    Args:
        answer: the file to write it to.
        plugin: the origin of the plugin, or "rainfusion" for the reference.
        backend: its backend's name.
    """
    from rainfusion.plugins import probe

    found = probe.announced_by(plugin) if backend is None else probe.devices_of(plugin, backend)
    part = Path(f"{answer}.part")
    part.write_text(json.dumps(found), encoding="utf-8")
    part.rename(answer)
    os._exit(0)  # what a stack does at exit is no part of the answer


if __name__ == "__main__":
    main(*sys.argv[1:])
