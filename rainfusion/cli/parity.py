"""``rainfusion parity``: the same problems on two backends."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rainfusion.cli.arguments import JSON

if TYPE_CHECKING:
    from rainfusion.plugins.conformance.cases import Case
    from rainfusion.plugins.conformance.parity import CaseComparison
    from rainfusion.plugins.conformance.target import Target

DISAGREED = 1


def parity(
    backend: Annotated[str, typer.Option(help="The backend under test, by name.")],
    against: Annotated[str, typer.Option(help="The backend it is compared with.")] = "reference",
    device: Annotated[str | None, typer.Option(help="Device of --backend.  \\[default: its best]")] = None,
    against_device: Annotated[str | None, typer.Option(help="Device of --against.  \\[default: its best]")] = None,
    cases: Annotated[str, typer.Option(metavar="PATTERN", help="Names to run, such as '*bf16' or 'video*'.")] = "*",
    seed: Annotated[int | None, typer.Option(help="Of the inputs.  \\[default: that of each case]")] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON record to a file.")] = None,
    as_json: JSON = False,
) -> None:
    """Run the same problems on two backends: worst errors of each case, exit status 1 where they disagree.

    Outputs are compared under one mask; the masks that each selects may differ only at near ties.

    What is allowed is what either may be away from a float64 computation, added up.

    A case that one of them does not claim is refused; if nothing was compared the exit status is 1 too.

    Example: [cyan]rainfusion parity --backend torch --cases 'video*'[/]
    """
    from rainfusion.cli.console import print_json, stderr
    from rainfusion.plugins.conformance.parity import compare_case
    from rainfusion.plugins.conformance.target import find_target

    pair = find_target(backend, device), find_target(against, against_device)
    chosen = _chosen(cases, seed)
    if str(pair[0]) == str(pair[1]):
        stderr().print(f"[yellow]both sides are {pair[0]}: this shows that it repeats itself, not that two agree[/]")
    compared = []
    with stderr().status("Starting") as status:
        for i, case in enumerate(chosen):
            status.update(f"{i + 1} of {len(chosen)}: {case.name}")
            compared.append(compare_case(*pair, case))
    record = record_of(pair, chosen, compared)
    if report is not None:
        _write(report, record)
    if as_json:
        print_json(record)
    else:
        _print(record, compared)
    if not record["agree"]:
        raise typer.Exit(DISAGREED)


def _chosen(pattern: str, seed: int | None) -> list[Case]:
    from rainfusion.plugins.conformance.cases import every_case

    every = every_case()
    chosen = [case for case in every if fnmatchcase(case.name, pattern)]
    if not chosen:
        some = ", ".join(case.name for case in every[:3])
        raise typer.BadParameter(f"no case is named like {pattern!r}; names are like {some}", param_hint="--cases")
    return chosen if seed is None else [replace(case, seed=seed) for case in chosen]


def record_of(
    pair: tuple[Target, Target], chosen: Sequence[Case], compared: Sequence[CaseComparison]
) -> dict[str, Any]:
    """What ``--json`` prints: who was compared, whether they agree, and every case with its input's fingerprint."""
    from rainfusion.plugins.conformance.environment import environment

    verdicts = [comparison.ok for comparison in compared]
    return {
        "environment": environment(),
        "backend": str(pair[0]),
        "against": str(pair[1]),
        "devices": [target.device.name for target in pair],
        "agree": True in verdicts and False not in verdicts,
        "agreed": verdicts.count(True),
        "disagreed": verdicts.count(False),
        "refused": verdicts.count(None),
        "cases": [
            {name: _finite(value) for name, value in asdict(comparison).items()}
            | ({} if comparison.ok is None else {"inputs": case.fingerprint(), "seed": case.seed})
            for case, comparison in zip(chosen, compared, strict=True)
        ],
    }


def _print(record: dict[str, Any], compared: Sequence[CaseComparison]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from rainfusion.cli.console import stdout

    out = stdout()
    table = Table("case", "", box=None, pad_edge=False)
    for name in ("error", "allowed", "relative", "lse", "same mask"):
        table.add_column(name, justify="right")
    for c in compared:
        if c.ok is None:
            continue
        verdict = "[green]agree[/]" if c.ok else "[bold red]DISAGREE[/]"
        figures = (f"{c.absolute:.1e}", f"{c.tolerance:.1e}", f"{c.relative:.1e}")
        lse = "-" if c.lse is None else f"{c.lse:.1e}"
        same = "-" if c.mask_agreement is None else f"{c.mask_agreement:.2%}"
        table.add_row(c.case, verdict, *figures, lse, same)
    table.columns[0].no_wrap = True
    if table.row_count:
        out.print(table, soft_wrap=False)
    for reason, names in _refusals(compared).items():
        out.print(f"[yellow]refused[/] {len(names)} ({escape(_some(names))}): {escape(reason)}", highlight=False)
    colour = "green" if record["agree"] else "bold red"
    counts = f"{record['agreed']} agree, {record['disagreed']} disagree, {record['refused']} refused"
    words = counts if record["agreed"] or record["disagreed"] else f"nothing was compared: {counts}"
    out.print(f"[{colour}]{record['backend']} against {record['against']}: {words}[/]", highlight=False)


def _refusals(compared: Sequence[CaseComparison]) -> dict[str, list[str]]:
    """The cases that were not compared, by reason."""
    found: dict[str, list[str]] = {}
    for comparison in compared:
        if comparison.ok is None:
            found.setdefault(comparison.refused, []).append(comparison.case)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN; they are written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint="--report") from error
