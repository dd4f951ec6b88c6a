"""The oracle: the reference backend in float64, and the errors that a backend may make against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import Select
from rainfusion.core.passes import prune
from rainfusion.core.policies import Fixed
from rainfusion.testing import tolerance
from rainfusion.testing.cases import Case
from rainfusion.testing.numbers import largest, rounded, typical_error, worst_error
from rainfusion.testing.target import Target, find_target

EXACT_RECIPES = ("ties",)


class Expected(NamedTuple):
    """The right output and log-sum-exp, float64, and how far from them a backend may be.

    Attributes:
        out_limit, lse_limit: at any element.
        typical_limit: root mean square over the output; None where the largest error says enough.
    """

    out: np.ndarray
    lse: np.ndarray
    out_limit: float
    lse_limit: float
    typical_limit: float | None = None


class ExpectedMask(NamedTuple):
    """The right mask, bool ``[B, H, q blocks, key blocks]``, and the pairs on which a backend may differ."""

    blocks: np.ndarray
    undecided: np.ndarray


def expected(case: Case, mask: BlockMask | None) -> Expected:
    """What the case's output must be under `mask` (on NumPy); None for a dense plan."""
    dtype, values = case.problem.dtype, ("%out", "%lse")
    right = _in_dtype(replace(case, precision=None, rotate=False), "float64", values, mask)
    coarse = _in_dtype(case, "float32", values, mask)
    in_float64 = dtype == "float64" and case.precision is None  # what 8 bits lose, no dtype of the tensors gives back
    share = tolerance.FLOAT64_FROM_FLOAT32 if in_float64 else 1.0
    out_error = worst_error(rounded(coarse["%out"], dtype), right["%out"]) * share
    lse_error = worst_error(coarse["%lse"], right["%lse"]) * share
    out_limit = tolerance.output_limit(dtype, out_error, largest(right["%out"]))
    lse_limit = tolerance.lse_limit(dtype, lse_error, largest(right["%lse"]))
    typical = None
    if case.precision is not None:
        error = typical_error(rounded(coarse["%out"], dtype), right["%out"])
        typical = tolerance.output_limit(dtype, error, typical_error(np.zeros_like(right["%out"]), right["%out"]))
    return Expected(right["%out"], right["%lse"], out_limit, lse_limit, typical)


def expected_value(case: Case, name: str) -> tuple[np.ndarray, float]:
    """What a block mean or a block score of the case must be, and how far from it a backend may be."""
    right, coarse = (_in_dtype(case, wide, ("%qb", "%kb", name)) for wide in ("float64", "float32"))
    limit = tolerance.score_epsilon(worst_error(coarse[name], right[name]), _magnitude(right, case))
    return right[name], limit * (tolerance.FLOAT64_FROM_FLOAT32 if case.problem.dtype == "float64" else 1.0)


def expected_mask(case: Case) -> ExpectedMask:
    """What the case's plan must select."""
    plan = case.plan()
    chosen = plan.find(Select)
    assert chosen is not None
    right, coarse = (_in_dtype(case, dtype, (chosen.score, "%qb", "%kb", "%mask")) for dtype in ("float64", "float32"))
    blocks = right["%mask"] > 0
    if case.values in EXACT_RECIPES:
        return ExpectedMask(blocks, np.zeros_like(blocks))
    score = np.where(np.isnan(right[chosen.score]), -np.inf, right[chosen.score])
    counts = np.broadcast_to(chosen.kv.counts, (case.problem.batch, 1, 1, chosen.kv.blocks))
    if case.kv_lengths:
        first = np.arange(chosen.kv.blocks) * chosen.kv.block
        counts = np.clip(np.reshape(case.kv_lengths, (-1, 1, 1, 1)) - first, 0, counts)
        score = np.where(counts > 0, score, -np.inf)
    epsilon = tolerance.score_epsilon(worst_error(coarse[chosen.score], right[chosen.score]), _magnitude(right, case))
    rows, free = (..., slice(chosen.q.free_blocks), slice(None)), chosen.kv.free_blocks
    undecided = np.zeros_like(blocks)
    kept = blocks[rows][..., :free].sum(axis=-1)
    if chosen.over == "free" or chosen.mass is not None:
        undecided[rows][..., :free] |= tolerance.near_border(score[rows][..., :free], kept, epsilon)
    if chosen.over == "all":
        quotas = plan.constant(chosen.quotas)
        assert quotas is not None
        undecided[rows] |= tolerance.near_border(score[rows], quotas, epsilon)
    if chosen.mass is not None:
        undecided[rows] |= tolerance.mass_nearly_reached(score[rows], counts, free, chosen.mass)
    undecided[..., free:] = False
    return ExpectedMask(blocks, undecided)


@lru_cache(maxsize=1)
def _reference() -> Target:
    return find_target("reference")


def _in_dtype(
    case: Case, dtype: str, returns: tuple[str, ...], mask: BlockMask | None = None
) -> Mapping[str, np.ndarray]:
    """Values of the case by their definitions in `dtype`, from inputs that stay rounded to the case's own dtype."""
    problem = replace(case.problem, dtype=dtype, tensor_layout="bhsd")
    plan = replace(case, problem=problem).plan(
        policy=case.policy if mask is None else Fixed(), returns=("%out", "%lse")
    )
    plan = prune(replace(plan, returns=returns))
    inputs = dict(zip(("q", "k", "v"), (x.astype(dtype) for x in case.inputs()), strict=True))
    given = {name: x for name, x in inputs.items() if plan.takes(f"%{name}")}
    clamped = {name: np.clip(x, 0, plan.kv_axis.length) for name, x in case.operands(plan).items()}
    return _reference().results(plan, _reference().lower(plan)(**given, mask=mask, **clamped))


def _magnitude(values: Mapping[str, np.ndarray], case: Case) -> float:
    """The largest sum of absolute products that make up a score."""
    qb, kb = np.abs(values["%qb"]), np.repeat(np.abs(values["%kb"]), case.problem.group, axis=1)
    with np.errstate(invalid="ignore"):
        return largest(qb @ kb.swapaxes(2, 3)) * abs(case.problem.scale)
