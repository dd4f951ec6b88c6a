"""``python -m tests.fuzz --problems 100000 --minutes 30``: random problems, held against an oracle of their own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import rainfusion
from tests.fuzz.problems import draw
from tests.fuzz.run import State, failures_of, installed, is_bad, steps

_FAILED, _REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 where every law holds, 1 where one does not, 2 where a backend is not here."""
    args = _parser().parse_args(arguments)
    console = Console(soft_wrap=True)
    try:
        backends = installed(tuple(args.backend))
    except rainfusion.BackendError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        return _REFUSED
    if args.seed is not None:
        return _replay(console, args.seed, backends)
    state = State.read(args.state)
    if args.start is not None:
        state.next_seed = args.start
    console.print(f"from seed {state.next_seed} on {', '.join(backends)}; state in {args.state}", highlight=False)
    found = _run(console, state, args, backends)
    console.print(
        f"{state.problems} problems in {state.seconds / 60:.1f} minutes, up to seed {state.next_seed - 1}: "
        f"{len(state.failures)} failures, {found} of them in this run",
        highlight=False,
    )
    return _FAILED if found else 0


def _run(console: Console, state: State, args: Any, backends: tuple[str, ...]) -> int:
    columns = (TextColumn("seed {task.fields[seed]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=args.problems, seed=state.next_seed)
        with suppress(KeyboardInterrupt):
            for found in steps(state, args.state, backends, args.problems, args.minutes):
                failed += len(found)
                for failure in found:
                    _show(progress.console, failure)
                progress.update(task, advance=1, seed=state.next_seed)
    return failed


def _replay(console: Console, seed: int, backends: tuple[str, ...]) -> int:
    """The problem of one seed, described, with everything that does not hold."""
    kind = " (one argument is then spoilt: it must be refused)" if is_bad(seed) else ""
    console.print(escape(f"{draw(seed)}{kind}"), highlight=False)
    found = failures_of(seed, backends)
    for failure in found:
        _show(console, failure)
    if not found:
        console.print(f"[green]every law holds[/] on {', '.join(backends)}")
    return _FAILED if found else 0


def _show(console: Console, failure: dict[str, Any]) -> None:
    where = failure["backend"] or "all"
    console.print(f"[bold red]seed {failure['seed']}[/] {where}: {escape(failure['message'])}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--problems", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after this time (default: 10)")
    parser.add_argument("--backend", action="append", default=[], help="may be repeated; default: all on the CPU here")
    parser.add_argument("--seed", type=int, help="replay the problem of this seed and describe it")
    parser.add_argument("--start", type=int, help="first seed (default: where the last run of this state ended)")
    parser.add_argument("--state", type=Path, default=Path(".fuzz.json"), help="the file that makes a run resumable")
    return parser


if __name__ == "__main__":
    sys.exit(main())
