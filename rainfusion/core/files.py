"""Opening a file that somebody else names: a regular one, and no more of it than is allowed.

Opening a pipe waits for its other end, a device may act or never end; their size says 0, so the kind of file is looked
at first, and once more after it was opened, when no other can be put in its place.
"""

from __future__ import annotations

import os
import stat
from os import PathLike
from pathlib import Path
from typing import IO, Any

from rainfusion.core.checks import shown

_CAREFUL = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


_LONGEST = 4095  # what Linux opens


class IrregularFileError(ValueError):
    """A file of another kind than is read, larger than is read, or no path at all."""


def as_path(path: Any) -> Path:
    """A str or path-like as a Path.

    Raises:
        IrregularFileError: anything else, or a text that no file system takes.
    """
    try:
        place = os.fspath(path)
        is_named = isinstance(place, str) and "\0" not in place and 0 < len(os.fsencode(place)) <= _LONGEST
    except Exception:  # no path, or text that no file name can hold
        is_named = False
    if not is_named:
        raise IrregularFileError(f"path={shown(path)} is not the path of a file; give a str or a pathlib.Path")
    return Path(place)


def open_regular(path: str | PathLike[str]) -> IO[bytes]:
    """Open a regular file for reading; it never waits.

    Raises:
        IrregularFileError: a device, a pipe, a socket or a folder, or no path.
        OSError: no such file, a loop of links, or it may not be read.
    """
    place = as_path(path)
    _refuse_irregular(place, place.stat())
    file = os.fdopen(os.open(place, os.O_RDONLY | _CAREFUL), "rb")
    try:
        _refuse_irregular(place, os.fstat(file.fileno()))
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: str | PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        IrregularFileError: as `open_regular`, or a larger file.
        OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(most + 1)  # files under /proc say 0, and others grow
    if size > most or len(content) > most:
        raise IrregularFileError(f"it is larger than {most} bytes, the most that is read")
    return content


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise IrregularFileError(f"{path} is not a regular file")
