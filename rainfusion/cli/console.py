"""What goes where: results to stdout, progress, warnings and errors to stderr."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from rainfusion.core.errors import RainfusionError, RainfusionWarning, SparsityWarning

FAILED = 2
# Some versions of typer bring a click of their own, under a private name.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_WIDTH = 120  # columns where the output is no terminal


def stdout() -> Console:
    """The console for results."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else _WIDTH)


def stderr() -> Console:
    """The console for everything else."""
    return Console(stderr=True, soft_wrap=True)


def print_json(record: Any) -> None:
    """Print a record as JSON, alone on stdout."""
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


_warned: set[str] = set()


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Show what rainfusion raises or warns of as a line on stderr; an error ends the program with status 2.

    So does an option that is not understood; where typer answers with the whole help, that is shown.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("once", RainfusionWarning)
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            yield
        except RainfusionError as error:
            _end_with(str(error))
        except _UsageError as error:
            message = error.format_message()
            if "\n" in message:
                error.show()
                sys.exit(FAILED)
            _end_with(message)
        except typer.Abort:
            _end_with("interrupted")


def _end_with(message: str) -> None:
    stderr().print(f"[bold red]error:[/] [red]{escape(message)}[/]", highlight=False)
    sys.exit(FAILED)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    ours = issubclass(category, RainfusionWarning)
    text = str(message) if ours else warnings.formatwarning(message, category, filename, lineno).strip()
    if text in _warned:
        return
    _warned.add(text)
    kind = "note" if issubclass(category, SparsityWarning) else "warning"
    stderr().print(f"[bold yellow]{kind}:[/] [yellow]{escape(text)}[/]", highlight=False)
