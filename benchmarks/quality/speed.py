"""What the rules of the quality measurements take on a CUDA device, at the size of a Wan 720p call.

    python benchmarks/quality/speed.py --json speed.json

Each figure is the time of dense attention (cuDNN) over that of the whole sparse call, from the same round; medians over
rounds in random order.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quality.groups import PAPER, SHARES, SINKS, sink
from rainfusion.core.errors import RainfusionWarning
from rainfusion.testing.environment import environment

GRID, HEADS, HEAD_DIM = (21, 45, 80), 40, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", RainfusionWarning)
    length = GRID[0] * GRID[1] * GRID[2]
    q, k, v = (torch.randn(1, length, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    calls: dict[tuple[str, float], Callable[[], Any]] = {("dense", 0.0): lambda: _dense(q, k, v)}
    rules = [PAPER, *(sink(*which, omitted) for which in SINKS for omitted in ("drop", "summary"))]
    for rule in rules:
        for share in SHARES:
            calls[rule.name, share] = lambda rule=rule, share=share: rule.attention(q, k, v, GRID, share)
    times: dict[tuple[str, float], list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(args.rounds):
        for name in random.sample([*calls], len(calls)):
            times[name].append(_milliseconds(calls[name]))
    dense = times["dense", 0.0]
    rows = [
        {
            "rule": rule,
            "asked": share,
            "ms": round(statistics.median(taken), 3),
            "speed_up": round(statistics.median(d / t for d, t in zip(dense, taken, strict=True)), 3),
        }
        for (rule, share), taken in times.items()
    ]
    for row in rows:
        print(row)
    if args.json:
        record = {"environment": environment(), "device": torch.cuda.get_device_name(), "grid": GRID, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))


def _milliseconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


if __name__ == "__main__":
    main()
