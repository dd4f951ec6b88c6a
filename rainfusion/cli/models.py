"""``rainfusion models``: the models of diffusers that can be made sparse, and those left alone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rainfusion.cli.arguments import JSON

if TYPE_CHECKING:
    from rich.table import Table


def models(as_json: JSON = False) -> None:
    """List the models of diffusers that apply_rainfusion knows, what was tested, and those left alone with the reason.

    The installed diffusers may be too old for some of them: their status says so.
    """
    from rainfusion.cli.console import print_json, stdout

    found, version = _models()
    if as_json:
        print_json({"diffusers": version, "models": found})
        return
    stdout().print(_table(found, version), soft_wrap=False)


def of_diffusers(module: str) -> Any:
    """A module of the diffusers integration, which says by itself what it lacks of diffusers.

    Raises:
        BackendUnavailableError: diffusers, or what it needs, is missing or too old.
    """
    from rainfusion.core.errors import BackendUnavailableError

    try:
        return importlib.import_module(f"rainfusion.integrations.diffusers.{module}")
    except ModuleNotFoundError as missing:
        raise BackendUnavailableError(
            f"{missing.name} is not installed", "pip install 'rainfusion[diffusers]'"
        ) from None


def _models() -> tuple[list[dict[str, Any]], str]:
    """A record for every model class, those left alone last, and the version of diffusers.

    Raises:
        BackendUnavailableError: diffusers, or what it needs, is missing or too old.
    """
    adapter = of_diffusers("adapter")
    import diffusers

    adapters, left_alone = adapter.known()
    there = {*dir(diffusers), *dir(diffusers.models)}
    listed = [
        {"family": one.family, "model": name, "installed": name in there, "tested": one.tested, "left_alone": None}
        for name, one in adapters.items()
    ]
    listed.sort(key=lambda record: (record["family"], record["model"]))
    listed += [
        {"family": "", "model": name, "installed": name in there, "tested": "", "left_alone": why}
        for name, why in sorted(left_alone.items())
    ]
    return listed, diffusers.__version__


def _table(found: list[dict[str, Any]], version: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("family", "model", "status", "what was tested, or why it is left alone", box=None, pad_edge=False)
    table.columns[0].style = "bold"
    table.columns[0].max_width = 24
    table.columns[1].overflow = "fold"  # a name is never cut
    family = None
    for record in found:
        status, colour = _status(record, version)
        shown = "" if record["family"] == family else record["family"]
        family = record["family"]
        said = record["left_alone"] or record["tested"]
        table.add_row(escape(shown), escape(record["model"]), f"[{colour}]{status}[/]", escape(said))
    return table


def _status(record: dict[str, Any], version: str) -> tuple[str, str]:
    """What can be done with a model here, and the colour of it."""
    if record["left_alone"]:
        return "left alone", "yellow"
    return ("known", "green") if record["installed"] else (f"not in diffusers {version}", "yellow")
