"""What 8 bits cost: the error of attention by its definitions, against exact arithmetic under the same mask.

python benchmarks/precision_error.py            # measure, write the record and the tables of docs/precision.md
python benchmarks/precision_error.py --tables   # the tables alone, from the records
python benchmarks/precision_error.py --backend triton --device cuda:0 --json h200.json   # a backend's kernels instead

Every tensor is rounded to bfloat16 first, as models give them, and so is every output. Errors are relative: the norm of
the difference over the norm of the right output; that of the log-sum-exp is a root mean square. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import rainfusion
from rainfusion import AttentionProblem, Fixed, Plan, TokenLayout, TopK, lower, ops, passes
from rainfusion.demo import decode, features
from rainfusion.testing.environment import environment

sys.path.insert(0, str(Path(__file__).parent))
from generated import filled

ROOT = Path(__file__).parents[1]
RECORDS, PAGE = ROOT / "hw_matrix/results/precision", ROOT / "docs/precision.md"
RECORD, ON_HOPPER = RECORDS / "emulated.json", RECORDS / "triton-h200.json"
GRID, HEADS, HEAD_DIM, SKIPPED = (8, 16, 32), 4, 128, 0.8

Tensors = list[np.ndarray]


# -- tensors -----------------------------------------------------------------------------------------


def noise(seed: int = 0) -> Tensors:
    rng = np.random.default_rng(seed)
    shape = (1, HEADS, int(np.prod(GRID)), HEAD_DIM)
    return [rng.standard_normal(shape, dtype=np.float32) for _ in range(3)]


def clip(name: str) -> Tensors:
    frames = _decoded[name] if name in _decoded else decode.load(name, GRID)
    return list(features.qkv(frames, GRID, heads=HEADS, head_dim=HEAD_DIM))


_decoded: dict[str, np.ndarray] = {}  # clips that were decoded on another machine


def wide() -> Tensors:
    q, k, v = noise()
    return [q * 3, k * 3, v]


def outliers() -> Tensors:
    q, k, v = noise()
    for x in (q, k):
        x[..., :3] *= 10
    return [q, k, v]


def biased() -> Tensors:
    q, k, v = noise()
    part = 5 * np.random.default_rng(1).standard_normal((2, 1, HEADS, 1, HEAD_DIM), dtype=np.float32)
    return [q, k + part[0], v + part[1]]


def sink() -> Tensors:
    """The first block draws nearly all weight, and its values are small."""
    q, k, v = noise()
    direction = np.sign(np.random.default_rng(1).standard_normal(HEAD_DIM)).astype(np.float32)
    first = TokenLayout(GRID, sink=None).order[:128]
    k[:, :, first] += direction
    v[:, :, first] /= 64
    return [q + direction, k, v]


SETS: dict[str, Callable[[], Tensors]] = {
    "clip: bikes": lambda: clip("bikes"),
    "clip: bigbuckbunny": lambda: clip("bigbuckbunny"),
    "clip: carphone": lambda: clip("carphone"),
    "white noise": noise,
    "white noise, q and k times 3": wide,
    "3 channels of q and k times 10": outliers,
    "keys and values with a common part": biased,
    "a sink block of small values": sink,
}


# -- ways to compute ---------------------------------------------------------------------------------


class AttendBfloat16(ops.Attend):
    """Softmax weights rounded to bfloat16, as kernels of 16 bits round them."""

    def weights(self, weights: Any, xp: Any) -> Any:
        return bfloat16(weights)


def bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def in_bfloat16(plan: Plan) -> Plan:
    attend = plan.find(ops.Attend)
    rounded = AttendBfloat16(**{f.name: getattr(attend, f.name) for f in fields(ops.Attend)})
    return replace(plan, ops=tuple(rounded if op is attend else op for op in plan.ops))


def weights_and_values(plan: Plan) -> Plan:
    """Queries and keys as they are."""
    plan = passes.quantised(plan, "fp8")
    attend = plan.find(ops.AttendQuantised)
    return passes.prune(
        replace(plan, ops=tuple(replace(op, q="%q", k="%k") if op is attend else op for op in plan.ops))
    )


WAYS: dict[str, Callable[[Plan], Plan]] = {
    "bf16": in_bfloat16,
    "int8": lambda plan: passes.quantised(plan, "int8"),
    "int8, rotated": lambda plan: passes.quantised(plan, "int8", rotated=True),
    "fp8": lambda plan: passes.quantised(plan, "fp8"),
    "fp8, rotated": lambda plan: passes.quantised(plan, "fp8", rotated=True),
    "p and v alone": weights_and_values,
}


# -- measuring ---------------------------------------------------------------------------------------


def errors(tensors: Tensors, grid: tuple[int, int, int] = GRID, block: int = 128) -> dict[str, Any]:
    """Of every way on one set of tensors, with the largest logit."""
    tensors = [bfloat16(x) for x in tensors]
    layout = TokenLayout(grid, block=block, sink=None)
    _, heads, tokens, dim = tensors[0].shape
    problem = AttentionProblem(1, heads, tokens, tokens, dim, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rainfusion.SparsityWarning)
        mask = lower(rainfusion.plan(problem, layout, TopK(SKIPPED), returns="%mask"), backend="reference")(
            *tensors[:2]
        )
    exact = rainfusion.plan(replace(problem, dtype="float64"), layout, Fixed(), returns=("%out", "%lse"))
    right, lse = lower(exact, backend="reference")(*(x.astype(np.float64) for x in tensors), mask=mask)
    plan = rainfusion.plan(problem, layout, Fixed(), returns=("%out", "%lse"))
    found: dict[str, Any] = {"largest_logit": largest_logit(*tensors[:2]), "out": {}, "lse": {}}
    for name, way in WAYS.items():
        out, own_lse = lower(way(plan), backend="reference")(*tensors, mask=mask)
        found["out"][name] = float(np.linalg.norm(bfloat16(out) - right) / np.linalg.norm(right))
        found["lse"][name] = float(np.sqrt(np.mean((own_lse - lse) ** 2)))
    return found


KERNELS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"precision": "int8"},
    "int8, rotated": {"precision": "int8", "rotate": True},
    "fp8": {"precision": "fp8"},
    "fp8, rotated": {"precision": "fp8", "rotate": True},
}


def errors_of_kernels(tensors: Tensors, backend: str, device: str) -> dict[str, Any]:
    """The same of a backend's kernels, in bfloat16, against float64 on the same device."""
    import torch

    q, k, v = (torch.from_numpy(x).to(device, torch.bfloat16) for x in tensors)
    layout, problem = TokenLayout(GRID, block=128, sink=None), AttentionProblem.from_tensors(q, k, v)
    mask = lower(rainfusion.plan(problem, layout, TopK(SKIPPED), returns="%mask"), device=device, backend=backend)(q, k)
    exact = rainfusion.plan(replace(problem, dtype="float64"), layout, Fixed(), returns=("%out", "%lse"))
    doubles = (x.double() for x in (q, k, v))
    right, right_lse = lower(exact, device=device, backend="torch")(*doubles, mask=mask)
    found: dict[str, Any] = {"out": {}, "lse": {}}
    for name, said in KERNELS.items():
        plan = rainfusion.plan(problem, layout, Fixed(), returns=("%out", "%lse"), **said)
        out, lse = lower(plan, device=device, backend=backend, strict=True)(q, k, v, mask=mask)
        found["out"][name] = float((out.double() - right).norm() / right.norm())
        found["lse"][name] = float((lse.double() - right_lse).square().mean().sqrt())
    return found


def largest_logit(q: np.ndarray, k: np.ndarray) -> float:
    rows = (np.abs(q[:, :, i : i + 512] @ k.swapaxes(2, 3)).max() for i in range(0, q.shape[2], 512))
    return float(max(rows)) * q.shape[3] ** -0.5


# -- the page ----------------------------------------------------------------------------------------


def tables(record: dict[str, Any], on_hopper: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, as Markdown, by name."""
    sets, kernels = record["sets"], on_hopper["sets"]
    head = ["tensors", "largest logit", *WAYS]
    return {
        "kernels": "\n".join(
            _table(
                ["tensors", *KERNELS],
                ([name, *(f"{100 * row['out'][way]:.2f} %" for way in KERNELS)] for name, row in kernels.items()),
            )
        ),
        "errors": "\n".join(
            _table(head, ([name, f"{row['largest_logit']:.0f}", *_out(row)] for name, row in sets.items()))
        ),
        "lse": "\n".join(
            _table(
                ["tensors", *WAYS], ([name, *(f"{row['lse'][way]:.2g}" for way in WAYS)] for name, row in sets.items())
            )
        ),
    }


def _out(row: dict[str, Any]) -> list[str]:
    return [f"{100 * row['out'][way]:.2f} %" for way in WAYS]


def _table(head: list[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    args = _arguments()
    if args.frames:
        _decoded.update(np.load(args.frames))
    if args.backend:
        sets = {name: errors_of_kernels(make(), args.backend, args.device) for name, make in SETS.items()}
        _write(args.json, {"environment": environment(), "backend": args.backend, "sets": sets})
        return
    if not args.tables:
        sets = {}
        for name, make in SETS.items():
            sets[name] = errors(make())
            print(name, json.dumps(sets[name]["out"]), flush=True)
        _write(RECORD, {"rainfusion": rainfusion.__version__, "numpy": np.__version__, "sets": sets})
    records = (json.loads(path.read_text(encoding="utf-8")) for path in (RECORD, ON_HOPPER))
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables(*records)), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="write the tables from the records, and measure nothing")
    parser.add_argument("--backend", help="measure this backend's kernels; the tables are left alone")
    parser.add_argument("--device", help="where (default: cuda:0)")
    parser.add_argument("--json", type=Path, help="where to write what a backend did (default: the record)")
    parser.add_argument("--frames", type=Path, help="an .npz of clips by name, where this machine cannot decode them")
    args = parser.parse_args()
    if args.tables and (args.backend or args.frames):
        parser.error("--tables measures nothing; leave out --backend and --frames")
    if not args.backend and (args.device or args.json):
        parser.error("--device and --json are about a backend; name one with --backend")
    args.device, args.json = args.device or "cuda:0", args.json or ON_HOPPER
    return args


def _write(path: Path, found: dict[str, Any]) -> None:
    shape = {"grid": GRID, "heads": HEADS, "head_dim": HEAD_DIM, "skipped": SKIPPED}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**found, **shape}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
