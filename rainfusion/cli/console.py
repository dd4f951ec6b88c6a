"""What goes where: results to stdout, progress, warnings and errors to stderr."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from rainfusion.core.errors import RainfusionError, RainfusionWarning, SparsityWarning

FAILED = 2
TRACEBACK = "RAINFUSION_TRACEBACK"
_MOST_SHOWN = 2000  # letters of a message: an argument may be longer than any screen
# Some versions of typer bring a click of their own, under a private name.
_UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
_MOST_DIGITS = 4
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

    So does an option that is not understood (where typer answers with the whole help, that is shown), an output that
    cannot be written, a size for which there is no memory, and any unexpected error. What reads the output may stop
    reading, as ``head`` does: no error.
    """
    _prepare_streams()
    _forget_odd_sizes()
    with warnings.catch_warnings():
        warnings.simplefilter("once", RainfusionWarning)
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            yield
        except SystemExit as ended:
            _end(0 if isinstance(ended.__context__, BrokenPipeError) else ended.code)  # which rich makes status 1
        except _UsageError as error:
            message = error.format_message()
            if "\n" in message:
                error.show()
                _end(FAILED)
            _end_with(message)
        except (typer.Abort, KeyboardInterrupt):
            _end_with("interrupted")
        except BrokenPipeError:
            _end(0)
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            _end_with(_in_words(error))


def _prepare_streams() -> None:
    """Characters that an output's encoding lacks are written as escapes, not refused after all the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    closed = sys.stdout is None
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when the program began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  # for as long as it runs
    if closed:
        _end_with("standard output is closed; send it to /dev/null to run without it")


def _forget_odd_sizes() -> None:
    """Sizes of a terminal that none has: rich makes numbers of any digits, and lines as wide as it is told."""
    for name in ("COLUMNS", "LINES"):
        said = os.environ.get(name, "")
        if not (said.isascii() and said.isdigit() and len(said) <= _MOST_DIGITS):
            os.environ.pop(name, None)


def _in_words(error: Exception) -> str:
    if isinstance(error, RainfusionError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory{_in_brackets(error)}; give a smaller problem"
    if isinstance(error, OSError):
        of = "" if error.filename is None else f"{error.filename}: "
        return f"{of}{error.strerror or error}"
    return f"{type(error).__name__}: {error} (a fault of rainfusion or below it; {TRACEBACK}=1 shows where)"


def _in_brackets(error: Exception) -> str:
    return f" ({error})" if str(error) else ""


def _end_with(message: str) -> NoReturn:
    with suppress(OSError):
        stderr().print(f"[bold red]error:[/] [red]{escape(_on_a_line(message))}[/]", highlight=False)
    _end(FAILED)


def _on_a_line(message: str) -> str:
    """The message cut to a readable length, without letters that would move the cursor or break the line."""
    cut = message if len(message) <= _MOST_SHOWN else f"{message[:_MOST_SHOWN]}..."
    return "".join(
        letter if letter.isprintable() else " " if letter == "\n" else letter.encode("unicode_escape").decode("ascii")
        for letter in cut
    )


def _end(status: Any) -> NoReturn:
    """End the program; what it has written is flushed here, where a failure can still be told."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _discard(stream)
        except (OSError, ValueError) as error:
            _discard(stream)
            if stream is sys.stdout and not status:
                _end_with(f"the output cannot be written: {getattr(error, 'strerror', None) or error}")
    sys.exit(status)


def _discard(stream: TextIO) -> None:
    """Send the rest of a stream nowhere, or Python would try once more at its end and say so."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    ours = issubclass(category, RainfusionWarning)
    text = str(message) if ours else warnings.formatwarning(message, category, filename, lineno).strip()
    if text in _warned:
        return
    _warned.add(text)
    kind = "note" if issubclass(category, SparsityWarning) else "warning"
    with suppress(OSError):
        stderr().print(f"[bold yellow]{kind}:[/] [yellow]{escape(text)}[/]", highlight=False)
