"""Block-sparse against dense attention with torch on this machine's CPU, or another device of torch.

    python benchmarks/torch_attention.py
    python benchmarks/torch_attention.py --dtypes bfloat16 --sparsity 0.9 --repeats 7

`rainfusion` is the whole call: block means, selection, token order, attention, order back, with the first
frame attended in full. `given mask` leaves the selection out. Ratios are of medians; the variants take
turns, so that what else the machine does hits all of them. "ideal" is the ratio of attended pairs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import rainfusion
from rainfusion.core.errors import SparsityWarning

HEAD_DIM = 128
# heads, grid of tokens
SIZES = ((12, (4, 32, 32)), (12, (8, 32, 32)), (3, (16, 32, 32)), (3, (21, 30, 52)))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    name = next((d.name for d in rainfusion.devices() if d.device.startswith(args.device) and d.device != "cpu"), "")
    where = name or f"{cpu_model()}, {args.threads} threads"
    print(f"{where}, torch {torch.__version__}, D={HEAD_DIM}")
    print(f"{'heads':>5} {'tokens':>7} {'grid':>9} {'dtype':>9} {'skipped':>8} {'ideal':>6} {'dense':>9} ", end="")
    print(f"{'rainfusion':>11} {'ratio':>6} {'given mask':>11} {'ratio':>6} {'summary':>9} {'ratio':>6}   (ms)")
    ratios = []
    for dtype in args.dtypes:
        for heads, grid in SIZES:
            text, ratio = line(heads, grid, dtype, args)
            print(text, flush=True)
            ratios.append(ratio)
    if args.json:
        args.json.write_text(json.dumps({"where": where, "ratios": ratios}, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the ratios to this file, as the hardware matrix reads them")
    return parser.parse_args()


def line(heads: int, grid: tuple[int, int, int], dtype: str, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """A row of the table, and the ratio of the whole call."""
    frames, height, width = grid
    tokens = frames * height * width
    torch.manual_seed(0)
    shape = (1, heads, tokens, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=args.device).to(getattr(torch, dtype)) for _ in range(3))

    def sparse(**how: object) -> object:
        how = {"sparsity": args.sparsity} | how if "mask" not in how else how
        return rainfusion.attention(q, k, v, grid=grid, backend="torch", **how)  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsityWarning)  # the table shows what is realised
        _, mask = sparse(return_mask=True)  # type: ignore[misc]
        dense, whole, given, summary = medians(
            {
                "dense": lambda: scaled_dot_product_attention(q, k, v),
                "whole": sparse,
                "given": lambda: sparse(mask=mask),
                "summary": lambda: sparse(omitted="summary"),
            },
            args.repeats,
            args.device,
        )
    head = f"{heads:>5} {tokens:>7} {'x'.join(map(str, grid)):>9} {dtype:>9} {mask.sparsity:>8.4f} "
    head += f"{1 / mask.density:>6.2f} {dense:>9.1f} "
    figures = (
        f"{whole:>11.1f} {dense / whole:>6.2f} {given:>11.1f} {dense / given:>6.2f} "
        f"{summary:>9.1f} {dense / summary:>6.2f}"
    )
    return head + figures, {
        "problem": f"{heads} heads of {HEAD_DIM}, {tokens} tokens, {mask.sparsity:.0%} skipped",
        "dtype": dtype,
        "baseline": "torch SDPA, dense",
        "ratio": round(dense / whole, 3),
    }


def medians(variants: dict[str, Callable[[], object]], repeats: int, device: str) -> list[float]:
    """Median milliseconds of each variant, after one round to warm up; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.accelerator.synchronize(device)
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return [statistics.median(of) for of in times.values()]


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
