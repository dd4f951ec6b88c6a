"""Random problems, held against an oracle of their own.

python -m tests.fuzz --problems 100000 --minutes 30 --workers 2
python -m tests.fuzz --backend triton --device cuda:0 --problems 10000 --minutes 8 --workers 32 --record fuzz.json
python -m tests.fuzz --seed 1234 --backend torch
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import rainfusion
from tests.fuzz import workers
from tests.fuzz.problems import draw_for
from tests.fuzz.run import State, failures_of, installed, is_bad, is_lost, record, steps

_FAILED, _REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 0 where every law holds, 1 where one does not, 2 where the run cannot be, 3 where the device was lost."""
    args = _parser().parse_args(arguments)
    console = Console(soft_wrap=True)
    torch.set_num_threads(1)  # problems are small
    try:
        backends = installed(tuple(args.backend), args.device)
        if args.workers > 1:
            return _run_workers(console, args)
        state = State.of_worker(args.state, args.start, *args.share)
    except (rainfusion.BackendError, ValueError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        return _REFUSED
    if args.seed is not None:
        return _replay(console, args.seed, backends, args.device)
    if args.share == (0, 1):
        console.print(f"from seed {state.next_seed} on {', '.join(backends)}; state in {args.state}", highlight=False)
    found = _run(console, state, args, backends)
    if args.share == (0, 1):
        _summarise(console, args, [state])
    if found and is_lost(args.device):
        return workers.DEVICE_LOST
    return _FAILED if found else 0


def _run(console: Console, state: State, args: Any, backends: tuple[str, ...]) -> int:
    columns = (TextColumn("seed {task.fields[seed]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed = 0
    shown = console.is_terminal and args.share == (0, 1)
    with Progress(*columns, console=console, disable=not shown) as progress:
        task = progress.add_task("", total=args.problems, seed=state.next_seed)
        with suppress(KeyboardInterrupt):
            for found in steps(state, args.state, backends, args.problems, args.minutes, args.device):
                failed += len(found)
                for failure in found:
                    _show(progress.console, failure)
                progress.update(task, advance=1, seed=state.next_seed)
    return failed


def _run_workers(console: Console, args: Any) -> int:
    """The same in several processes, each with a state of its own."""
    share, more = divmod(args.problems, args.workers)
    team = []
    for worker in range(args.workers):
        state = args.state.with_name(f"{args.state.name}.{worker}")
        State.of_worker(state, args.start, worker, args.workers)  # refused here, before anything starts
        said = ["--share", f"{worker}/{args.workers}", "--start", str(args.start)]
        said += ["--device", args.device, *(f"--backend={name}" for name in args.backend)]
        team.append(workers.Worker(said, state, share + (worker < more)))
    console.print(f"{args.workers} workers; states in {args.state}.0 and so on", highlight=False)

    def states() -> list[State]:
        return [State.read(worker.state) for worker in team if worker.state.exists()]

    before = sum(len(state.failures) for state in states())
    could_run = False
    with suppress(KeyboardInterrupt):
        could_run = workers.run(team, args.minutes, lambda: record(args.record, states(), args.device))
        if not could_run:
            console.print("[bold red]error:[/] a worker could not run; what it printed says why")
    ended = states()
    _summarise(console, args, ended)
    if not could_run:
        return _REFUSED
    return _FAILED if sum(len(state.failures) for state in ended) > before else 0


def _summarise(console: Console, args: Any, states: Sequence[State]) -> None:
    facts = record(args.record, states, args.device)
    console.print(
        f"{facts['problems']} problems in {facts['minutes']} minutes, up to seed {facts['last_seed']}: "
        f"{len(facts['failures'])} failures",
        highlight=False,
    )
    for failure in facts["failures"][:20]:
        _show(console, failure)


def _replay(console: Console, seed: int, backends: tuple[str, ...], device: str) -> int:
    """The problem of one seed, described, with everything that does not hold."""
    kind = " (one argument is then spoilt: it must be refused)" if is_bad(seed) else ""
    console.print(escape(f"{draw_for(seed, device)}{kind}"), highlight=False)
    found = failures_of(seed, backends, device)
    for failure in found:
        _show(console, failure)
    if not found:
        console.print(f"[green]every law holds[/] on {', '.join(backends)}")
    return _FAILED if found else 0


def _show(console: Console, failure: dict[str, Any]) -> None:
    where = failure["backend"] or "all"
    console.print(f"[bold red]seed {failure['seed']}[/] {where}: {escape(failure['message'])}", highlight=False)


def _share(text: str) -> tuple[int, int]:
    worker, _, workers = text.partition("/")
    return int(worker), int(workers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after this time (default: 10)")
    parser.add_argument("--backend", action="append", default=[], help="may be repeated; default: all on the CPU here")
    parser.add_argument("--device", default="cpu", help="where tensors lie, such as cuda:0 (default: cpu)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--seed", type=int, help="replay the problem of this seed and describe it")
    parser.add_argument("--start", type=int, default=0, help="first seed of a new run (default: 0)")
    parser.add_argument("--state", type=Path, default=Path(".fuzz.json"), help="the file that makes a run resumable")
    parser.add_argument("--record", type=Path, help="write what was run and found to this file, as JSON")
    parser.add_argument("--share", type=_share, default=(0, 1), help=argparse.SUPPRESS)  # of the seeds: i/n
    return parser


if __name__ == "__main__":
    sys.exit(main())
