"""``rainfusion parity``: the same problems on two backends, on one machine or on two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rainfusion.cli.arguments import JSON

if TYPE_CHECKING:
    from rainfusion.plugins.conformance.agreement import Agreement
    from rainfusion.plugins.conformance.cases import Case
    from rainfusion.plugins.conformance.parity import CaseComparison

DISAGREED = 1


def parity(
    backend: Annotated[str | None, typer.Option(help="The backend under test, by name.")] = None,
    against: Annotated[str, typer.Option(help="The backend it is compared with.")] = "reference",
    device: Annotated[str | None, typer.Option(help="Device of --backend.  \\[default: its best]")] = None,
    against_device: Annotated[str | None, typer.Option(help="Device of --against.  \\[default: its best]")] = None,
    cases: Annotated[
        str, typer.Option(metavar="PATTERN", help="Names to run, such as '*bf16', 'video*' or 'clip*'.")
    ] = "*",
    seed: Annotated[int | None, typer.Option(help="Of the inputs.  \\[default: that of each case]")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the JSON record to a file, for --compare.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare two reports instead of running anything.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Run the same problems on two backends: worst errors of each case, exit status 1 where they disagree.

    Outputs are compared under one mask; the masks that each selects may differ only at near ties.

    What is allowed is what either may be away from a float64 computation, added up.

    A case that one of them does not claim is refused; if nothing was compared the exit status is 1 too.

    Two machines: each writes a --report, and either compares them. Reports of other inputs are refused.

    Example: [cyan]rainfusion parity --backend torch --cases 'video*'[/]

    Example: [cyan]rainfusion parity --compare mine.json yours.json[/]
    """
    if compare is not None:
        given = {"--backend": backend, "--device": device, "--seed": seed, "--report": report}
        for option in (name for name, value in given.items() if value is not None):
            raise typer.BadParameter(f"{option} is about running cases; --compare runs none", param_hint=option)
        agreed = _compare_files(*compare, cases, as_json)
    elif backend is None:
        raise typer.BadParameter("name a backend, or give two reports to --compare", param_hint="--backend")
    else:
        agreed = _run(backend, device, against, against_device, _chosen(cases, seed), report, as_json)
    if not agreed:
        raise typer.Exit(DISAGREED)


# -- two backends here -----------------------------------------------------------------------------


def _run(
    backend: str,
    device: str | None,
    against: str,
    against_device: str | None,
    chosen: Sequence[Case],
    report: Path | None,
    as_json: bool,
) -> bool:
    from rainfusion.cli.console import print_json, stderr
    from rainfusion.plugins.conformance.exchange import report_of
    from rainfusion.plugins.conformance.parity import compare_case
    from rainfusion.plugins.conformance.target import find_target

    pair = find_target(backend, device), find_target(against, against_device)
    if str(pair[0]) == str(pair[1]):
        stderr().print(f"[yellow]both sides are {pair[0]}: this shows that it repeats itself, not that two agree[/]")
    compared = []
    with stderr().status("Starting") as status:
        for i, case in enumerate(chosen):
            status.update(f"{i + 1} of {len(chosen)}: {case.name}")
            compared.append(compare_case(*pair, case))
    record = report_of(pair, chosen, compared)
    if report is not None:
        _write(report, record)
    if as_json:
        print_json(record)
    else:
        _print_run(f"{pair[0]} against {pair[1]}", compared)
    return bool(record["agree"])


def _chosen(pattern: str, seed: int | None) -> list[Case]:
    from rainfusion.plugins.conformance.cases import every_case

    every = every_case()
    chosen = [case for case in every if fnmatchcase(case.name, pattern)]
    if not chosen:
        some = ", ".join(case.name for case in every[:3])
        raise typer.BadParameter(f"no case is named like {pattern!r}; names are like {some}", param_hint="--cases")
    return chosen if seed is None else [replace(case, seed=seed) for case in chosen]


def _print_run(who: str, compared: Sequence[CaseComparison]) -> None:
    rows = [
        (c.case, c.ok, f"{c.absolute:.1e}", f"{c.tolerance:.1e}", f"{c.relative:.1e}", _lse(c.lse), _share(c))
        for c in compared
        if c.ok is not None
    ]
    _print_table(("error", "allowed", "relative", "lse", "same mask"), rows)
    _print_end(who, compared, {c.case: c.refused for c in compared if c.ok is None})


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint="--report") from error


# -- two reports -----------------------------------------------------------------------------------


def _compare_files(a: Path, b: Path, pattern: str, as_json: bool) -> bool:
    from rainfusion.cli.console import print_json, stderr
    from rainfusion.plugins.conformance.agreement import compare_reports
    from rainfusion.plugins.conformance.exchange import read_report

    first, second = (read_report(path).only(lambda name: fnmatchcase(name, pattern)) for path in (a, b))
    if first.who == second.who:
        stderr().print(f"both reports are of {first.who}: no two machines are compared", style="yellow", markup=False)
    found = compare_reports(first, second)
    agreed = any(x.ok for x in found) and all(x.ok is not False for x in found)
    if as_json:
        print_json({"first": first.who, "second": second.who, "agree": agreed, "cases": [asdict(x) for x in found]})
    else:
        _print_compared(first.who, second.who, found, len({*first.cases} ^ {*second.cases}))
    return agreed


def _print_compared(first: str, second: str, found: Sequence[Agreement], alone: int) -> None:
    from rainfusion.cli.console import stdout

    columns = ("apart at most", "allowed", "relative", "apart (rms)", "lse at most", "same mask", "same bits")
    rows = [
        (x.case, x.ok, *(f"{y:.1e}" for y in (x.bound, x.allowed, x.relative, x.rms)), _lse(x.lse), _share(x), _yes(x))
        for x in found
        if x.ok is not None
    ]
    _print_table(columns, rows)
    out = stdout()
    for x in found:
        if x.ok is False:
            out.print(f"{x.case}: {x.why}", style="red", markup=False, highlight=False)
    if alone:
        out.print(f"{alone} cases are in one report only", style="yellow", highlight=False)
    _print_end(f"{first} and {second}", found, {x.case: x.why for x in found if x.ok is None})


# -- both ------------------------------------------------------------------------------------------


def _print_table(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Print the cases that were compared: name, verdict, figures."""
    from rich.markup import escape
    from rich.table import Table

    from rainfusion.cli.console import stdout

    table = Table("case", "", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for name in columns:
        table.add_column(name, justify="right")
    for case, ok, *figures in rows:
        table.add_row(escape(case), "[green]agree[/]" if ok else "[bold red]DISAGREE[/]", *figures)
    if rows:
        stdout().print(table, soft_wrap=False)


def _print_end(who: str, verdicts: Sequence[CaseComparison | Agreement], refused: dict[str, str]) -> None:
    """Print what was refused, by reason, and the count of all."""
    from rainfusion.cli.console import stdout

    out = stdout()
    reasons: dict[str, list[str]] = {}
    for case, reason in refused.items():
        reasons.setdefault(reason, []).append(case)
    for reason, names in reasons.items():
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        out.print(f"refused {len(names)} ({some}): {reason}", style="yellow", markup=False, highlight=False)
    oks = [x.ok for x in verdicts]
    counts = f"{oks.count(True)} agree, {oks.count(False)} disagree, {oks.count(None)} refused"
    words = counts if True in oks or False in oks else f"nothing was compared: {counts}"
    style = "green" if True in oks and False not in oks else "bold red"
    out.print(f"{who}: {words}", style=style, markup=False, highlight=False)


def _lse(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _share(x: CaseComparison | Agreement) -> str:
    return "-" if x.mask_agreement is None else f"{x.mask_agreement:.2%}"


def _yes(x: Agreement) -> str:
    return "yes" if x.same_bits else "no"
