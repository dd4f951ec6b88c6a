"""``rainfusion new-backend``: write a package with a backend, which passes the conformance kit as written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from rainfusion.cli.arguments import JSON

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_LONGEST = 32  # letters, so that lines of the package stay readable
# The name is also the type in the device's address, where these mean devices of torch or the host.
_DEVICE_TYPES = frozenset({"cpu", "cuda", "hpu", "meta", "mps", "npu", "xla", "xpu"})
# What is written, under names that may hold the fields of `_fields`, and the templates of their text.
_FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    ".gitignore": "gitignore.in",
    ".github/workflows/tests.yml": "tests.yml.in",
    "conftest.py": "conftest.py.in",
    "${package}/__init__.py": "__init__.py.in",
    "${package}/backend.py": "backend.py.in",
    "tests/test_${name}.py": "test_kit.py.in",
}


def new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backend's name, as users will write it.")],
    folder: Annotated[
        Path | None, typer.Option(help="The folder to create.  \\[default: NAME-rainfusion in the current one]")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Write a package with a backend for an accelerator, into a new folder.

    It computes with NumPy, is found by its entry point and passes the conformance kit as written; its README says what
    to replace, in which order.

    Example: [cyan]rainfusion new-backend acme[/]
    """
    from rainfusion.cli.console import print_json, stdout

    _check_name(name)
    fields = _fields(name)
    place = Path(fields["distribution"]) if folder is None else folder
    written = _write(place, _texts(fields))
    if as_json:
        print_json({"backend": name, "folder": str(place), "files": written})
        return
    into = shlex.quote(str(place))
    steps = (f"cd {into}", "pip install --editable '.[test]'", "rainfusion devices", "python -m pytest")
    say = stdout()
    for line in (f"wrote {place}", *(f"  {file}" for file in written), "next", *(f"  {step}" for step in steps)):
        say.print(line, highlight=False, markup=False)


def _check_name(name: str) -> None:
    """Refuse a name that cannot be used, or that something else has.

    Raises:
        typer.BadParameter: the message says which of the two, and what to do.
    """
    if len(name) > _LONGEST or not _NAME.fullmatch(name):
        raise typer.BadParameter(
            f"{name[:80]!r} cannot name a backend; give lower-case letters and digits, a letter first, words joined by"
            f" _, at most {_LONGEST} in all, such as my_chip",
            param_hint="NAME",
        )
    if name in _DEVICE_TYPES:
        raise typer.BadParameter(
            f"{name!r} is the name of a kind of device; give the backend one of its own, such as my_{name}",
            param_hint="NAME",
        )
    if taken := _taken(name):
        raise typer.BadParameter(f"{name!r} is taken: {taken}; give another name", param_hint="NAME")


def _taken(name: str) -> str:
    """What has the name already; empty where nothing does. Plugins that are switched off count."""
    from rainfusion.plugins.installed import entries
    from rainfusion.plugins.manager import host

    if name in host().names or name in {entry.name for entry in entries()[0]}:
        return "a backend of that name is installed"
    package = _fields(name)["package"]
    return f"a package {package} can be imported here" if find_spec(package) else ""


def _fields(name: str) -> dict[str, str]:
    """What templates are filled with."""
    from rainfusion import INTERFACE, __version__

    return {
        "name": name,
        "title": "".join(word.capitalize() for word in name.split("_")),
        "package": f"{name}_rainfusion",
        "distribution": f"{name.replace('_', '-')}-rainfusion",
        "version": __version__,
        "api": str(INTERFACE),
    }


def _texts(fields: dict[str, str]) -> dict[str, str]:
    """The text of every file, by its path inside the package's folder."""
    templates = files("rainfusion.cli") / "templates"
    return {
        Template(path).substitute(fields): Template((templates / source).read_text(encoding="utf-8")).substitute(fields)
        for path, source in _FILES.items()
    }


def _write(folder: Path, texts: dict[str, str]) -> list[str]:
    """Write the files into a folder that is not there yet; all of them, or nothing is left.

    Raises:
        typer.BadParameter: something is there already, or the folder that it is to lie in is not.
        OSError: it cannot be written.
    """
    if os.path.lexists(folder):
        raise typer.BadParameter(f"{folder} is there already; give another with --folder", param_hint="--folder")
    if not folder.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {folder.parent}; create it first", param_hint="--folder")
    folder.mkdir()
    try:
        for path, text in texts.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return list(texts)
