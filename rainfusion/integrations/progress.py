"""A bar on stderr for work that takes minutes."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rainfusion.integrations.config import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """One bar with a label, by `rich`; a context manager.

    Args:
        shown: False for no bar.

    Raises:
        ConfigError: a bar is wanted, and rich is not installed.
    """

    def __init__(self, shown: bool) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if not shown:
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        except ImportError:
            raise ConfigError("a progress bar needs rich: pip install rich, or give progress=False") from None
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))

    def begin(self, label: str, total: float) -> None:
        """Another stage of the work, in place of the last one."""
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(label, total=total)

    def at(self, done: float) -> None:
        """How much of the stage is done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)

    def advance(self) -> None:
        """One more is done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)

    def __enter__(self) -> Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
