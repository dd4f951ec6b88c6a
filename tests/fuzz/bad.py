"""Problems that are none: a good call with one argument that does not fit, which must be refused.

Refused means a RainfusionError that says so, before anything is computed; any other exception, and any result, is a
fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import rainfusion
from tests.fuzz.laws import LawBroken, Subject, Trial
from tests.fuzz.problems import Generator, Problem, draw_for

Arguments = dict[str, Any]
Spoil = Callable[[Arguments, Trial, Generator], None]


def _set(name: str, *values: Any) -> Spoil:
    """One argument, one of these values."""

    def spoil(said: Arguments, trial: Trial, rng: Generator) -> None:
        said[name] = values[rng.integers(len(values))]

    return spoil


def _shape(name: str, change: Callable[[Any], Any]) -> Spoil:
    """A tensor of another shape or dtype."""

    def spoil(said: Arguments, trial: Trial, rng: Generator) -> None:
        said[name] = change(said[name])

    return spoil


def _policy(*makers: Callable[[], Any]) -> Spoil:
    def spoil(said: Arguments, trial: Trial, rng: Generator) -> None:
        _without_choice(said)
        said["policy"] = makers[rng.integers(len(makers))]()

    return spoil


def _sparsity(*values: Any) -> Spoil:
    def spoil(said: Arguments, trial: Trial, rng: Generator) -> None:
        _without_choice(said)
        said["sparsity"] = values[rng.integers(len(values))]

    return spoil


def _parts(*parts: Callable[[], Any]) -> Spoil:
    """The sequence as parts that are none, or that make another length."""

    def spoil(said: Arguments, trial: Trial, rng: Generator) -> None:
        for name in ("grid", "text", "text_position", "sink", "window"):
            said.pop(name, None)
        said["parts"] = parts[rng.integers(len(parts))]()

    return spoil


def _two_choices(said: Arguments, trial: Trial, rng: Generator) -> None:
    _without_choice(said)
    said |= {"sparsity": 0.5, "policy": rainfusion.TopP(0.5)}


def _many_shares(said: Arguments, trial: Trial, rng: Generator) -> None:
    _without_choice(said)
    said["sparsity"] = (0.5,) * (trial.problem.heads + 1)


def _quotas(said: Arguments, trial: Trial, rng: Generator) -> None:
    _without_choice(said)
    rows = trial.oracle.q.free
    wrong = [np.ones((1, rows + 1), int), np.ones((trial.problem.heads + 1, rows), int), np.ones((1, rows)), "many"]
    said["quotas"] = wrong[rng.integers(len(wrong))]


def _lengths(said: Arguments, trial: Trial, rng: Generator) -> None:
    batch = trial.problem.batch
    wrong = [np.ones(batch + 1, int), np.ones(batch), np.ones((batch, 1), int), ["a"] * batch, np.ones(batch, bool)]
    said["kv_lengths"] = wrong[rng.integers(len(wrong))]


def _mask(said: Arguments, trial: Trial, rng: Generator) -> None:
    _without_choice(said)
    problem, oracle = trial.problem, trial.oracle
    grid = np.ones((problem.batch, problem.heads, oracle.q.blocks, oracle.kv.blocks), dtype=bool)
    makers: list[Callable[[], Any]] = [
        lambda: grid,
        lambda: trial.block_mask(grid.astype(np.int32)),
        lambda: trial.block_mask(grid[..., :-1]),
        lambda: trial.block_mask(np.concatenate([grid, grid], axis=0)),
        lambda: trial.block_mask(grid[0]),
        lambda: rainfusion.BlockMask(grid, problem.q_len, problem.kv_len, (0, 1)),
    ]
    said["mask"] = makers[rng.integers(len(makers))]()


def _rotation(said: Arguments, trial: Trial, rng: Generator) -> None:
    """A rotation of what is not rounded, or of channels that have no Hadamard transform."""
    dim = trial.problem.head_dim
    said["rotate"] = True
    said["precision"] = None if dim & (dim - 1) == 0 else (None, "int8", "fp8")[rng.integers(3)]


def _gradient(said: Arguments, trial: Trial, rng: Generator) -> None:
    for name in ("q", "k", "v"):
        x = said[name]
        x = x if isinstance(x, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(x.astype(np.float32)))
        said[name] = x.float().clone().requires_grad_()
    _without_choice(said)


def _without_choice(said: Arguments) -> None:
    for name in ("sparsity", "policy", "mask", "quotas"):
        said.pop(name, None)


def _as_integers(x: Any) -> Any:
    return x.to(torch.int32) if isinstance(x, torch.Tensor) else np.zeros(x.shape, np.int32)


def _as_other_float(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(torch.float32 if x.dtype == torch.float64 else torch.float64)
    return x.astype(np.float32 if x.dtype == np.float64 else np.float64)


_NAN, _INFINITY = float("nan"), float("inf")
_TENSORS: tuple[Spoil, ...] = (
    *(_set(name, None, 1.5, "tensor", [[1.0]]) for name in ("q", "k", "v")),
    *(_shape(name, lambda x: x[0]) for name in ("q", "k", "v")),
    *(_shape(name, lambda x: x[None]) for name in ("q", "k", "v")),
    *(_shape(name, lambda x: x[:0]) for name in ("q", "k", "v")),
    *(_shape(name, lambda x: x[:, :0]) for name in ("q", "k", "v")),
    *(_shape(name, lambda x: x[..., :0]) for name in ("q", "k", "v")),
    *(_shape(name, _as_integers) for name in ("q", "k", "v")),
    *(_shape(name, _as_other_float) for name in ("q", "k", "v")),
    *(_shape(name, lambda x: x[:, :, : x.shape[2] - 1]) for name in ("k", "v")),
)
_SETTINGS: tuple[Spoil, ...] = (
    _set("block", 0, -1, 1.5, "8", (8,), (8, 8, 8), True, None, 2**31, (8, 0)),
    _set("window", (0, 1, 1), (1, 2), "2x8x8", 8, (1, 1, -8), (1.0, 2, 4)),
    _set("omitted", "keep", None, 1),
    _set("order", "blocks", None, 0),
    _set("tensor_layout", "sbhd", None, 4),
    _set("precision", "int4", "INT8", 8, True, np.int8, ["int8"]),
    _set("rotate", "yes", None, 2),
    _rotation,
    _set("scale", _NAN, _INFINITY, "1", True, 1e400, [1.0]),
    _set("backend", "abacus", 5),
    _sparsity(1.0, -0.1, _NAN, "0.8", True, (), 2, (0.5, 1.0), [0.5, _NAN]),
    _policy(
        lambda: 5,
        lambda: rainfusion.TopK,
        lambda: rainfusion.TopK(1.0),
        lambda: rainfusion.TopK(0.5, "published"),
        lambda: rainfusion.TopP(1.1),
        lambda: rainfusion.TopP(0.5, -0.5),
        lambda: rainfusion.TopP(None),  # type: ignore[arg-type]
        lambda: rainfusion.Hybrid(0.5, _NAN),
        rainfusion.Fixed,
    ),
    _parts(
        lambda: (5,),
        lambda: "grid",
        lambda: 5,
        lambda: (rainfusion.Grid(0, 1, 1),),
        lambda: (rainfusion.Grid(1, 1.5, 1),),  # type: ignore[arg-type]
        lambda: (rainfusion.Text(-1),),
        lambda: (rainfusion.Tokens("many"),),  # type: ignore[arg-type]
        lambda: (rainfusion.Grid(2, 2, 2, sink="middle"),),
        lambda: (rainfusion.Grid(2, 2, 2, sink=("first_frame", "first_frame_keys")),),
        lambda: (rainfusion.Text(2**20 + 1),),
        lambda: (rainfusion.Grid(2**16, 2**16, 2**16),),
        lambda: (rainfusion.Text(1),) * 2000,
    ),
    _two_choices,
    _many_shares,
    _quotas,
    _lengths,
    _mask,
    _gradient,
)


def check_refused(seed: int, backend: str, device: str = "cpu") -> None:
    """A call that does not fit is refused, whatever is wrong with it.

    Raises:
        LawBroken: it is not, or by an error that does not say so.
    """
    problem = _plain(draw_for(seed, device))
    rng = problem.rng(7)
    trial = Trial(Subject(problem, device), backend)
    said: Arguments = {**trial.arrays, **problem.settings, **trial.choice, **trial.operands, "backend": backend}
    group = _TENSORS if rng.random() < 0.4 else _SETTINGS
    spoil = group[rng.integers(len(group))]
    try:
        spoil(said, trial, rng)
        before = {name: value for name, value in said.items() if name not in ("q", "k", "v")}
        rainfusion.attention(**said)
    except rainfusion.RainfusionError as error:
        if not str(error):
            raise LawBroken("refused without a word") from error
        return
    raise LawBroken(f"accepted, though it does not fit: {before}")


def _plain(problem: Problem) -> Problem:
    """The problem without what could make a spoilt argument a good one, such as a length that fits anyway."""
    return replace(problem, poison="", strides="plain")
