"""A few small attentions through both Triton kernels, for NVIDIA's compute-sanitizer; results are checked as well.

    compute-sanitizer --tool memcheck python3 -m tests.backends.triton.sanitise
    compute-sanitizer --tool racecheck python3 -m tests.backends.triton.sanitise --kernel hopper
    TRITON_INTERPRET=1 python3 -m tests.backends.triton.sanitise --device cpu:0      # without a GPU: results alone

Each line is a problem: the kernel that ran, and whether the result is that of the fuzzer's oracle. The status is 0
where all are, 1 where one is not or another kernel ran than was asked for; compute-sanitizer's own findings need its
option ``--error-exitcode``. Memory is not cached between calls, so that an access beyond a tensor is one beyond an
allocation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when torch first allocates

import warnings

import numpy as np
import torch

import rainfusion
from rainfusion.backends.triton import attend, hardware
from tests.fuzz.laws import LawBroken, Subject, Trial, check_mask, check_numbers
from tests.fuzz.problems import Choice, Part, Problem

_TEXT, _GRID = Part("text", (37,)), Part("grid", (4, 12, 13))
_LENGTH = _TEXT.count + _GRID.count  # 661: blocks of 128 and of 64 end ragged

_BASE = Problem(
    seed=0,
    parts=(_GRID, _TEXT),
    window=None,
    block=(128, 128),
    short_form=False,
    batch=2,
    heads=4,
    kv_heads=2,
    q_len=_LENGTH,
    kv_len=_LENGTH,
    head_dim=128,
    dtype="bfloat16",
    tensor_layout="bhsd",
    scale=None,
    choice=Choice("topk", 0.5),
    omitted="drop",
    order="window",
    returns=(False, False),
    values="normal",
    poison="",
    strides="plain",
    kind="torch",
    lengths=None,
    with_quotas=False,
)
_PADDED = np.array([_LENGTH - 21, _LENGTH - 37])

# What both kernels take; each in head dims 64 and 128.
_SHARED: dict[str, dict[str, Any]] = {
    "ragged, shared keys": {},
    "log-sum-exp": {"returns": (True, False)},
    "summaries": {"omitted": "summary"},
    "padding": {"lengths": _PADDED, "poison": "padding", "returns": (True, False)},
    "padding, summaries": {"lengths": _PADDED, "omitted": "summary"},
    "rows that keep nothing": {"choice": Choice("mask"), "returns": (True, False), "seed": 7},
    "other keys": {"parts": (), "kv_len": 300, "choice": Choice("topp", mass=0.7), "order": "given"},
    "strides, float16": {"tensor_layout": "bshd", "strides": "swapped", "dtype": "float16"},
}
# What only the plain one takes.
_PLAIN: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "returns": (True, False), "omitted": "summary"},
    "small blocks, odd head dim": {"block": (24, 16), "head_dim": 17, "lengths": _PADDED},
    "scale below zero": {"scale": -0.25, "block": (64, 64), "head_dim": 80},
}


def main() -> int:
    """Run all; 0 where every result is right and of the kernel that was meant."""
    args = _parser().parse_args()
    warnings.simplefilter("ignore", rainfusion.RainfusionWarning)  # problems are too small to spend a budget well
    is_hopper = hardware.architecture(torch.device(args.device)) == "sm_90"
    kernels = ("plain", "hopper") if args.kernel is None and is_hopper else (args.kernel or "plain",)
    failed = 0
    for kernel in kernels:
        cases = {f"{name}, {dim}": (said, dim) for name, said in _SHARED.items() for dim in (64, 128)}
        cases |= {name: (said, 128) for name, said in _PLAIN.items()} if kernel == "plain" else {}
        for name, (said, dim) in cases.items():
            problem = replace(_BASE, **{"head_dim": dim, **said})
            failed += not _holds(kernel, name, Subject(problem, args.device))
    print(f"{failed} failed" if failed else "all right")
    return 1 if failed else 0


def _holds(kernel: str, name: str, subject: Subject) -> bool:
    """Run one problem and print whether its mask and its numbers are right."""
    ran = _watch(with_hopper=kernel == "hopper")
    trial, (lse, mask) = Trial(subject, "triton"), subject.problem.returns
    try:
        results = trial.attention(lse=lse, mask=mask)
        found = "" if set(ran) == {kernel} else f"ran {', '.join(ran) or 'no kernel'}"
        grid = check_mask(trial, None)
        check_numbers(trial, results, grid)
    except (LawBroken, RuntimeError, rainfusion.RainfusionError) as error:
        found = f"{type(error).__name__}: {error}"
    print(f"{kernel:7} {name:35} {found or 'ok'}", flush=True)
    return not found


def _watch(*, with_hopper: bool) -> list[str]:
    """A list that takes the name of every attention kernel launched from now on; Hopper's may be left out."""
    ran: list[str] = []
    hopper = _find_hopper() if with_hopper else None
    rainfusion.cache.clear()  # kernels are chosen once for a plan
    attend._hopper = lambda: None if hopper is None else _Watched(hopper, ran)
    attend.attend_blocks = _noting(_attend_blocks, "plain", ran)
    return ran


class _Watched:
    """Hopper's module, whose launches are noted."""

    def __init__(self, hopper: Any, ran: list[str]) -> None:
        self.can_fetch, self.attend_hopper = hopper.can_fetch, _noting(hopper.attend_hopper, "hopper", ran)


def _noting(function: Callable[..., Any], name: str, ran: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **said: Any) -> Any:
        ran.append(name)
        return function(*args, **said)

    return call


_find_hopper, _attend_blocks = attend._hopper, attend.attend_blocks


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="default: cuda:0")
    parser.add_argument("--kernel", choices=("plain", "hopper"), help="default: both, where the device is a Hopper")
    return parser


if __name__ == "__main__":
    sys.exit(main())
