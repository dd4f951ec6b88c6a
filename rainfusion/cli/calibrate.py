"""``rainfusion calibrate``: measure what skipping blocks costs in every head of a pipeline's models."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rainfusion.cli.arguments import JSON, shares
from rainfusion.cli.models import of_diffusers

_MOST_PROMPTS = 2**20  # bytes of a file
_MOST_CONFIG = 2**24


def calibrate(
    factory: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION", help="Your function without arguments that returns a pipeline, or (model, run)."
        ),
    ],
    prompts: Annotated[Path, typer.Option(help="A text file with a prompt a line.")],
    out: Annotated[Path, typer.Option(help="The file to write, JSON.")],
    sparsity: Annotated[float, typer.Option(help="Mean share of block pairs to skip.")] = 0.8,
    config: Annotated[
        Path | None, typer.Option(help="A RainFusionConfig as JSON: block, window, sink, dense steps.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.  \\[default: the pipeline's]")] = None,
    every: Annotated[int, typer.Option(min=1, help="Denoising steps from one that is measured to the next.")] = 3,
    probes: Annotated[
        int, typer.Option(min=0, help="Forwards of a model that are run again for weights and the check.")
    ] = 4,
    sensitivity: Annotated[
        bool, typer.Option(help="Weight layers by what reaches the model's output: probes x layers forwards.")
    ] = True,
    ranks: Annotated[int, typer.Option(min=1, help="Devices that are to carry equal work.")] = 1,
    tried: Annotated[
        str | None, typer.Option("--shares", metavar="SHARE,SHARE...", help="Shares to measure, ascending.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Measure the error of every head at several shares of skipped blocks, and write budgets for every head.

    The module is looked for in the current folder, too.

    Example: [cyan]rainfusion calibrate my_module:make_pipeline --prompts prompts.txt --out wan.json[/]
    """
    from rainfusion.cli.console import print_json, stderr, stdout
    from rainfusion.integrations.calibration import SHARES
    from rainfusion.integrations.config import RainFusionConfig

    measure = of_diffusers("calibrate").calibrate
    chosen = (
        RainFusionConfig() if config is None else RainFusionConfig.from_json(_text(config, _MOST_CONFIG, "--config"))
    )
    listed = [line.strip() for line in _text(prompts, _MOST_PROMPTS, "--prompts").splitlines() if line.strip()]
    if not listed:
        raise typer.BadParameter(f"{prompts} has no prompt; write one a line", param_hint="--prompts")
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {out.parent}", param_hint="--out")
    if out.is_dir():
        raise typer.BadParameter(f"{out} is a folder; name a file", param_hint="--out")
    wanted: Any = SHARES if tried is None else shares(tried, "--shares", "several, ascending")
    target, run = _target_of(factory)
    if run is not None and steps is not None:
        raise typer.BadParameter(
            f"{factory} returns a model and a function that runs it, which sets its own steps", param_hint="--steps"
        )
    found = measure(
        target,
        listed,
        sparsity=sparsity,
        config=chosen,
        shares=wanted if isinstance(wanted, tuple) else (wanted,),
        run=run,
        every=every,
        probes=probes,
        sensitivity=sensitivity,
        ranks=ranks,
        **({} if steps is None else {"num_inference_steps": steps}),
    )
    found.save(out)
    stderr().print(f"wrote {out}", highlight=False, markup=False)
    if as_json:
        print_json({"file": str(out), **found.summary()})
    else:
        stdout().print(found.table(), soft_wrap=False)
        stdout().print(found.said(), highlight=False, markup=False)


def _text(path: Path, most: int, option: str) -> str:
    from rainfusion.core.files import IrregularFileError, read_regular

    try:
        return read_regular(path, most).decode("utf-8")
    except (IrregularFileError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as text: {error}", param_hint=option) from None


def _target_of(factory: str) -> tuple[Any, Any]:
    """What the function returns: a pipeline and None, or a model and a function that runs it for a prompt."""
    name, _, function = factory.partition(":")
    if not name or not function:
        raise typer.BadParameter(f"{factory!r} is not MODULE:FUNCTION, such as my_module:make_pipeline")
    if os.getcwd() not in sys.path:  # noqa: PTH109  # as sys.path has it
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        make = getattr(importlib.import_module(name), function, None)
    except Exception as error:
        raise typer.BadParameter(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(make):
        raise typer.BadParameter(f"{name} has no function {function}")
    result = make()
    return result if isinstance(result, tuple) and len(result) == 2 else (result, None)
