"""What using masks again saves: attention with a fresh selection against attention with masks of an earlier step.

    python benchmarks/mask_reuse.py
    python benchmarks/mask_reuse.py --backends triton torch --device cuda --tokens 75600 --heads 40 --dtype bfloat16

Columns, each the time of `fresh` by its own in the same round (the median of the rounds), so that above 1 is faster:

`given`      a mask is given, and nothing is selected: what reuse by age alone costs (`refresh_every`).
`none anew`  the drift of all heads is measured, and every mask is used again (`reuse_drift`).
`quarter`    the same, and every fourth head is selected anew.
`all anew`   all heads are selected anew, and their masks and means are kept.

Random tensors, no sink: only time is measured here. The variants take turns in random order. A device is waited for
once in `--calls` calls, as a pipeline would once in many layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rainfusion
from rainfusion.core.checks import LARGEST
from rainfusion.core.errors import RainfusionWarning
from rainfusion.integrations.clock import Moment
from rainfusion.integrations.config import RainFusionConfig
from rainfusion.integrations.reuse import Masks, taken
from rainfusion.testing.environment import environment

COLUMNS = ("given", "none anew", "quarter", "all anew")
GRIDS = {2048: (8, 16, 16), 4096: (8, 16, 32), 8192: (8, 32, 32), 32760: (21, 30, 52), 75600: (21, 45, 80)}


def main() -> None:
    args = _arguments()
    warnings.simplefilter("ignore", RainfusionWarning)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}: {args.heads} heads of {args.head_dim}, {args.dtype}, {args.sparsity:.0%} skipped")
    print(f"{'backend':>10} {'tokens':>7} {'fresh, ms':>10} " + " ".join(f"{name:>10}" for name in COLUMNS))
    record: dict[str, Any] = {"where": where, "environment": environment(), "cpu_time": args.cpu_time, "rows": []}
    for backend, tokens in itertools.product(args.backends, args.tokens):
        times = rounds(variants(backend, GRIDS[tokens], args), args)
        fresh = times["fresh"]
        ratios = {name: median([a / b for a, b in zip(fresh, times[name], strict=True)]) for name in COLUMNS}
        ms = {name: median(of) for name, of in times.items()}
        print(f"{backend:>10} {tokens:>7} {ms['fresh']:>10.2f} " + " ".join(f"{r:>10.3f}" for r in ratios.values()))
        problem = f"{args.heads} heads of {args.head_dim}, {tokens} tokens, {args.dtype}, {args.sparsity:.0%} skipped"
        record["rows"].append({"backend": backend, "problem": problem, "ms": ms, "ratios": ratios})
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["reference", "torch", "openvino"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], choices=[*GRIDS])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, on a CPU that has other work to do")
    parser.add_argument("--json", type=Path, help="write the figures")
    return parser.parse_args()


def variants(backend: str, grid: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """The functions that are timed."""
    shape = (1, grid[0] * grid[1] * grid[2], args.heads, args.head_dim)
    tensors = [torch.randn(shape, device=args.device).to(getattr(torch, args.dtype)) for _ in range(3)]
    q, k, v = [x.numpy() for x in tensors] if backend == "reference" else tensors
    layout = rainfusion.TokenLayout(grid, sink=None)
    settings: dict[str, Any] = {"grid": grid, "sink": None, "tensor_layout": "bshd", "backend": backend}
    masks = Masks(RainFusionConfig(refresh_every=LARGEST, reuse_drift=9.0))
    kept, steps = masks.at("here", args.heads), itertools.count(1)

    def fresh() -> Tensor:
        return rainfusion.attention(q, k, v, sparsity=args.sparsity, **settings)

    def anew(heads: range | list[int]) -> Tensor:
        """As the engine does it, with the heads chosen here."""
        moment, means = Moment(0, next(steps), None, ""), masks.means(q, k, layout, "window")
        if len(heads) == args.heads:
            out, mask = rainfusion.attention(q, k, v, sparsity=args.sparsity, return_mask=True, **settings)
            kept.put(heads, mask, moment, means)
            return out
        kept.stale(moment, means)
        if heads:
            chosen = taken(q, heads, 2), taken(k, heads, 2)
            kept.put(heads, rainfusion.select(*chosen, sparsity=args.sparsity, **settings), moment, means)
        return rainfusion.attention(q, k, v, mask=kept.mask, **settings)

    anew(range(args.heads))
    given = kept.mask
    return {
        "fresh": fresh,
        "given": lambda: rainfusion.attention(q, k, v, mask=given, **settings),
        "none anew": lambda: anew([]),
        "quarter": lambda: anew(range(0, args.heads, 4)),
        "all anew": lambda: anew(range(args.heads)),
    }


def rounds(runs: dict[str, Callable[[], Any]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of a call of each variant, round by round, after one to warm up."""
    order = random.Random(0)
    clock = time.process_time if args.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.rounds + 1):
        for name, run in order.sample([*runs.items()], len(runs)):
            start = clock()
            for _ in range(args.calls):
                run()
            if args.device != "cpu":
                torch.accelerator.synchronize()
            if turn:
                times[name].append((clock() - start) * 1e3 / args.calls)
    return times


def median(numbers: list[float]) -> float:
    """The median, to four places."""
    return round(statistics.median(numbers), 4)


if __name__ == "__main__":
    main()
