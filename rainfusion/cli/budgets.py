"""``rainfusion budgets``: the budgets that follow from a calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rainfusion.cli.arguments import JSON


def budgets(
    file: Annotated[Path, typer.Argument(help="What `rainfusion calibrate` wrote.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Mean share of block pairs to skip.  \\[default: the calibration's]")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Devices that are to carry equal work.  \\[default: the calibration's]")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Show the budgets of every layer that follow from a calibration; nothing is measured.

    The JSON record is a value for the sparsity of a RainFusionConfig.

    Example: [cyan]rainfusion budgets wan.json --sparsity 0.9[/]
    """
    from rainfusion.cli.console import print_json, stdout
    from rainfusion.integrations.calibration import Calibration

    calibration = Calibration.load(file)
    if as_json:
        print_json(calibration.budget(sparsity, ranks).to_dict())
        return
    stdout().print(calibration.table(sparsity, ranks), soft_wrap=False)
    stdout().print(calibration.said(), highlight=False, markup=False)
