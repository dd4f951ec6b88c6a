"""Whether memory grows with what a process has seen: shapes, head dims, budgets, text lengths.

    python benchmarks/memory_growth.py                       # every backend that is here, 2,000 calls each
    python benchmarks/memory_growth.py --backend openvino --vary head_dim --calls 500

Each line is a process of its own: resident memory after the first 100 calls, half way and at the end, how often
more the last is than the first, and threads. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

import rainfusion

VARIED = ("shape", "head_dim", "budget", "text", "lengths", "all")
FIRST = 100
ALLOWED = 1.3
_DRAW = np.random.default_rng(0)


def resident() -> tuple[float, int]:
    """MiB in memory and threads of this process."""
    status = Path("/proc/self/status").read_text()
    size, threads = (re.search(rf"{name}:\s+(\d+)", status) for name in ("VmRSS", "Threads"))
    assert size is not None
    assert threads is not None
    return int(size[1]) / 1024, int(threads[1])


def grow(backend: str, vary: str, calls: int) -> tuple[list[int], int]:
    """MiB after the first calls, half way and after all, and threads."""
    sizes, threads = [], 0
    for call in range(calls):
        one_call(backend, vary, call)
        if call + 1 in (min(FIRST, calls), calls // 2, calls):
            gc.collect()
            size, threads = resident()
            sizes.append(round(size))
    return sizes, threads


def one_call(backend: str, vary: str, call: int) -> None:
    """A call that differs from the earlier ones in what varies."""

    def varies(*names: str) -> bool:
        return vary in (*names, "all")

    # Primes step through all values without a trend: or the later calls would need more than the early ones.
    shape, other = call * 683 % 1995, call * 101
    frames, height, width = (2 + shape % 5, 6 + shape // 5 % 19, 8 + shape // 95) if varies("shape") else (4, 12, 14)
    text = 1 + other % 499 if varies("text") else 16
    head_dim = 8 + other % 249 if varies("head_dim") else 64
    sparsity = 0.3 + 0.6 * (other % 1999) / 1999 if varies("budget") else 0.7
    tokens = frames * height * width + text
    q, k, v = (_DRAW.standard_normal((1, 2, tokens, head_dim), np.float32) for _ in range(3))
    lengths = np.array([tokens - call % 16]) if varies("lengths") else None
    rainfusion.attention(
        q,
        k,
        v,
        grid=(frames, height, width),
        text=text,
        sparsity=sparsity,
        block=32,
        omitted=("drop", "summary")[call % 2],
        kv_lengths=lengths,
        backend=backend,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="default: every one that is ready here")
    parser.add_argument("--vary", choices=VARIED, help="default: each in turn")
    parser.add_argument("--calls", type=int, default=2000)
    asked = parser.parse_args()
    if asked.backend and asked.vary:
        import warnings

        warnings.simplefilter("ignore", rainfusion.RainfusionWarning)
        sizes, threads = grow(asked.backend, asked.vary, asked.calls)
        growth = sizes[-1] / sizes[0]
        shown = " -> ".join(f"{size:5}" for size in sizes)
        print(
            f"{asked.backend:<10} {asked.vary:<9} {shown} MiB, {growth:5.2f} times, "
            f"{threads} threads{'' if growth <= ALLOWED else f'   MORE THAN {ALLOWED}'}",
            flush=True,
        )
        return
    ready = {status.backend for status in rainfusion.devices() if status.status == "ready" and status.device == "cpu"}
    for backend in [asked.backend] if asked.backend else sorted(ready - {"triton"}):
        for vary in [asked.vary] if asked.vary else VARIED:
            command = [sys.executable, __file__, "--backend", backend, "--vary", vary, "--calls", str(asked.calls)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
