"""Two revisions of rainfusion side by side: is a backend as fast as it was?

    git worktree add .base HEAD~1
    python benchmarks/revisions.py .base . --backend openvino
    python benchmarks/revisions.py .base . --backend triton --device cuda --rounds 5

For each problem: the whole call, the mask chain alone (a plan that returns the mask), attention by a given mask, and
the host's time for a call, by public names that both revisions have. Each round is a fresh process for each revision,
in turn, so that neither has the cooler machine; figures are medians over rounds of medians, and ratios base / head:
above 1, the second revision is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

VIDEOS = {
    "cpu": ((4, (16, 16, 16), "float32"), (12, (8, 32, 32), "float32"), (12, (8, 32, 32), "bfloat16")),
    "cuda": ((12, (8, 16, 16), "bfloat16"), (12, (21, 30, 52), "bfloat16"), (40, (21, 45, 80), "bfloat16")),
}
HEAD_DIM = 128


def main() -> None:
    args = _arguments()
    if args.inside:
        print("figures " + json.dumps(figures(args.backend, args.device, args.seconds, args.only)))
        return
    times: dict[str, dict[str, list[float]]] = {}
    for turn in range(args.rounds):
        pair = [("base", args.base), ("head", args.head)]
        for name, folder in pair if turn % 2 else reversed(pair):
            for problem, ms in _measured(folder, args).items():
                times.setdefault(problem, {}).setdefault(name, []).append(ms)
    record = []
    print(f"{'problem':<70} {'base':>9} {'head':>9} {'base / head':>12}   (ms)")
    for problem, by_revision in times.items():
        base, head = (statistics.median(by_revision[name]) for name in ("base", "head"))
        print(f"{problem:<70} {base:>9.3f} {head:>9.3f} {base / head:>12.3f}")
        record.append({"problem": problem, "base_ms": base, "head_ms": head, "ratio": round(base / head, 3)})
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, help="a checkout of the revision to compare with")
    parser.add_argument("head", type=Path, help="a checkout of the revision in question")
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--device", default="cpu", choices=sorted(VIDEOS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="to measure each figure for, in each round")
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose name has this in it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, str(args.base), str(args.head), "--inside", "--backend", args.backend]
    command += ["--device", args.device, "--seconds", str(args.seconds), "--only", args.only]
    paths = [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = next((line for line in ran.stdout.splitlines() if line.startswith("figures ")), None)
    if line is None:
        raise SystemExit(f"{folder} could not be measured:\n{ran.stderr[-2000:]}")
    measured: dict[str, float] = json.loads(line.removeprefix("figures "))
    return measured


def figures(backend: str, device: str, seconds: float, only: str = "") -> dict[str, float]:
    """Median milliseconds of every figure, with the revision that is on the path."""
    import torch

    import rainfusion

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    found = {}
    for heads, grid, dtype in VIDEOS[device]:
        name = f"{heads} heads, {'x'.join(map(str, grid))}, {dtype}"
        if only not in name:
            continue
        shape = (1, heads, grid[0] * grid[1] * grid[2], HEAD_DIM)
        q, k, v = (torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for _ in range(3))
        layout, problem = rainfusion.TokenLayout(grid), rainfusion.AttentionProblem.from_tensors(q, k, v)
        where = {"backend": backend, "device": "cuda:0" if device == "cuda" else "cpu"}

        def call(q: Any = q, k: Any = k, v: Any = v, grid: Any = grid, **how: Any) -> Any:
            return rainfusion.attention(q, k, v, grid=grid, backend=backend, **how)

        chain = rainfusion.lower(rainfusion.plan(problem, layout, rainfusion.TopK(0.8), returns="%mask"), **where)
        given = rainfusion.lower(rainfusion.plan(problem, layout, rainfusion.Fixed()), **where)
        mask = chain(q, k, v)
        runs = {
            "whole call, 80 %": lambda call=call: call(sparsity=0.8),
            "whole call, 80 %, summaries": lambda call=call: call(sparsity=0.8, omitted="summary"),
            "whole call, 90 %": lambda call=call: call(sparsity=0.9),
            "mask chain": lambda chain=chain, x=(q, k, v): chain(*x),
            "attention by a given mask": lambda given=given, x=(q, k, v), mask=mask: given(*x, mask=mask),
        }
        for what, run in runs.items():
            found[f"{name}: {what}"] = _median(run, device, seconds)
        if device == "cuda":
            for what in ("whole call, 80 %", "whole call, 80 %, summaries", "mask chain"):
                found[f"{name}: host time, {what}"] = _host_time(runs[what])
    return found


def _median(run: Any, device: str, seconds: float) -> float:
    run()
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=int(250 * seconds), rep=int(500 * seconds), return_mode="median"))
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _host_time(run: Any, calls: int = 50) -> float:
    """Milliseconds until a call returns, the device idle before it."""
    import torch

    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


if __name__ == "__main__":
    main()
