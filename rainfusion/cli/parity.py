"""``rainfusion parity``: the same problems on two backends, on one machine or on two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rainfusion.cli.arguments import JSON

if TYPE_CHECKING:
    from rainfusion.testing.cases import Case
    from rainfusion.testing.observation import Agreement
    from rainfusion.testing.report import Report
    from rainfusion.testing.target import Target

DISAGREED = 1


def parity(
    backend: Annotated[str | None, typer.Option(help="The backend under test, by name.")] = None,
    against: Annotated[str, typer.Option(help="The backend it is compared with.")] = "reference",
    device: Annotated[str | None, typer.Option(help="Device of --backend.  \\[default: its best]")] = None,
    against_device: Annotated[str | None, typer.Option(help="Device of --against.  \\[default: its best]")] = None,
    cases: Annotated[
        str, typer.Option(metavar="PATTERN", help="Names to run, such as '*bf16', 'video*' or 'clip*'.")
    ] = "*",
    seed: Annotated[int | None, typer.Option(min=0, help="Of the inputs.  \\[default: that of each case]")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Run cases of finite numbers in 8 bits: 'int8' or 'fp8'.  \\[default: as each says]"),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write what --backend did to a file, for --compare.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Compare two reports instead of running anything.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Run the same problems on two backends: how far they are apart in each, exit status 1 where they disagree.

    Each case runs twice: attention under a given mask, and the whole call with a mask of its own. Outputs are
    compared under one mask; the masks that each selects may differ only at near ties.

    What is allowed is what either may be away from a float64 computation, added up.

    A case that one of them does not claim is refused; if nothing was compared the exit status is 1 too.

    Two machines: each writes a --report, and either compares them; reports of the conformance kit will do as well.

    Example: [cyan]rainfusion parity --backend torch --cases 'video*'[/]

    Example: [cyan]rainfusion parity --compare mine.json yours.json[/]
    """
    from rainfusion.cli.console import print_json, stderr
    from rainfusion.testing.observation import plain
    from rainfusion.testing.report import compare as compare_reports
    from rainfusion.testing.report import read_report
    from rainfusion.testing.target import find_target

    if compare is not None:
        given = {"--backend": backend, "--device": device, "--seed": seed, "--report": report}
        given["--precision"] = precision
        for option in (name for name, value in given.items() if value is not None):
            raise typer.BadParameter(f"{option} is about running cases; --compare runs none", param_hint=option)
        pair = [read_report(path).only(lambda name: fnmatchcase(name, cases)) for path in compare]
    elif backend is None:
        raise typer.BadParameter("name a backend, or give two reports to --compare", param_hint="--backend")
    else:
        targets = find_target(backend, device), find_target(against, against_device)
        pair = _run(targets, _chosen(cases, seed, precision))
        if report is not None:
            _write(report, pair[0])
    first, second = pair
    if first.who == second.who:
        stderr().print(f"both sides are {first.who}: no two are compared", style="yellow", markup=False)
    found = compare_reports(first, second)
    agreed = any(x.ok for x in found) and all(x.ok is not False for x in found)
    if as_json:
        cases_found = [{key: plain(value) for key, value in asdict(x).items()} for x in found]
        print_json({"first": first.who, "second": second.who, "agree": agreed, "cases": cases_found})
    else:
        _print(first, second, found)
    if not agreed:
        raise typer.Exit(DISAGREED)


def _run(targets: tuple[Target, Target], chosen: Sequence[Case]) -> list[Report]:
    """What two backends do on the cases: two reports."""
    from rainfusion.cli.console import stderr
    from rainfusion.testing.environment import environment
    from rainfusion.testing.observe import observe
    from rainfusion.testing.report import Report, Result

    results: tuple[list[Result], ...] = ([], [])
    with stderr().status("Starting") as status:
        for i, case in enumerate(chosen):
            status.update(f"{i + 1} of {len(chosen)}: {case.name}")
            for target, into in zip(targets, results, strict=True):
                into += [Result.of(observe(target, case, level)) for level in ("attend", "attention")]
    return [Report(target.described(), environment(), into) for target, into in zip(targets, results, strict=True)]


def _chosen(pattern: str, seed: int | None, precision: str | None) -> list[Case]:
    from rainfusion.testing.cases import every_case, in_precision

    every = every_case()
    if precision is not None:
        every = in_precision(every, precision)
    chosen = [case for case in every if fnmatchcase(case.name, pattern)]
    if not chosen:
        some = ", ".join(case.name for case in every[:3])
        raise typer.BadParameter(f"no case is named like {pattern!r}; names are like {some}", param_hint="--cases")
    return chosen if seed is None else [replace(case, seed=seed) for case in chosen]


def _write(path: Path, report: Report) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}", param_hint="--report") from error


def _print(first: Report, second: Report, found: Sequence[Agreement]) -> None:
    """Print a row for each comparison, what speaks against it, what was refused by reason, and the count of all."""
    from rich.table import Table

    from rainfusion.cli.console import stdout

    out = stdout()
    table = Table("case", "", "", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for name in ("bound", "allowed", "relative", "rms", "lse bound", "same mask", "same bits"):
        table.add_column(name, justify="right")
    for x in (x for x in found if x.ok is not None):
        figures = ("-" if y is None else f"{y:.1e}" for y in (x.bound, x.allowed, x.relative, x.rms, x.lse))
        same = "-" if x.same_mask is None else f"{x.same_mask:.2%}", "yes" if x.same_bits else "no"
        table.add_row(x.case, x.level, "[green]agree[/]" if x.ok else "[bold red]DISAGREE[/]", *figures, *same)
    if table.rows:
        out.print(table, soft_wrap=False)

    def say(text: str, style: str) -> None:
        out.print(text, style=style, markup=False, highlight=False)

    for x in (x for x in found if x.ok is False):
        say(f"{x.case}: {x.level}: {x.why}", "red")
    refused: dict[str, list[str]] = {}
    for x in (x for x in found if x.ok is None):
        refused.setdefault(x.why, []).append(x.case)
    for reason, names in refused.items():
        some = ", ".join(dict.fromkeys(names[:5])) + (", ..." if len(names) > 5 else "")
        say(f"refused {len(names)} ({some}): {reason}", "yellow")
    if alone := len({*first.observations} ^ {*second.observations}):
        say(f"{alone} observations are in one report only", "yellow")
    oks = [x.ok for x in found]
    counts = f"{oks.count(True)} agree, {oks.count(False)} disagree, {oks.count(None)} refused"
    words = counts if True in oks or False in oks else f"nothing was compared: {counts}"
    say(f"{first.who} and {second.who}: {words}", "green" if True in oks and False not in oks else "bold red")
