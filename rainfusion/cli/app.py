"""The commands put together. Each imports what it works with when it runs, so that help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from rainfusion.cli.budgets import budgets
from rainfusion.cli.calibrate import calibrate
from rainfusion.cli.devices import devices
from rainfusion.cli.models import models
from rainfusion.cli.new_backend import new_backend
from rainfusion.cli.parity import parity
from rainfusion.cli.plan import plan
from rainfusion.cli.run import run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (devices, models, plan, run, parity, calibrate, budgets, new_backend):
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        from rainfusion import __version__

        typer.echo(f"rainfusion {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Block-sparse attention for video and image diffusion transformers, on any accelerator."""
