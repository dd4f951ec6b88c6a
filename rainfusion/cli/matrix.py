"""``rainfusion matrix``: what runs where, on what evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rainfusion.cli.arguments import JSON

if TYPE_CHECKING:
    from rainfusion.matrix.matrix import Matrix

STALE = 1


def matrix(
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="With targets.toml, results/ and xfails/.")] = Path(
        "hw_matrix"
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit status 1 where the table is not to be believed.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Write the hardware matrix, MATRIX.md, from what people listed and what machines recorded.

    With --check: fails where the table is stale, a record is older than its backend's code allows or does not fit
    its target, a failure is not listed as known, or a known one is no longer seen; each with what to do.

    Example: [cyan]rainfusion matrix --check[/]
    """
    from rainfusion.cli.console import print_json, stderr, stdout
    from rainfusion.matrix.check import complaints
    from rainfusion.matrix.matrix import read_matrix
    from rainfusion.matrix.page import page

    read = read_matrix(folder)
    if not check:
        read.page.write_text(page(read), encoding="utf-8")
        stderr().print(f"wrote {read.page}", markup=False, highlight=False)
    found = complaints(read)
    if as_json:
        print_json({"targets": _targets(read), "complaints": found})
    elif not check:
        stdout().print(_overview(read), soft_wrap=False)
    for complaint in found:
        stderr().print(complaint, style="red" if check else "yellow", markup=False, highlight=False)
    if check:
        if not found and not as_json:
            words = f"{read.page} holds: {len(read.records)} records, {len(read.targets)} targets"
            stdout().print(words, style="green", markup=False, highlight=False)
        raise typer.Exit(STALE if found else 0)


def _overview(read: Matrix) -> Any:
    from rich.table import Table

    from rainfusion.matrix.page import summary

    table = Table("target", "hardware", "what is known", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for name, target in read.targets.items():
        table.add_row(name, target.chip.title, summary(read, target))
    return table


def _targets(read: Matrix) -> dict[str, Any]:
    return {
        name: {
            dtype: {
                "status": cell.status.words,
                "by": cell.by,
                "known_failures": cell.known_failures,
                "cases": cell.cases,
            }
            for dtype, cell in read.cells(target).items()
        }
        for name, target in read.targets.items()
    }
