"""The tolerance of the kit for wide logits: right kernels pass, with room; wrong ones do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import rainfusion
from rainfusion import AttentionProblem, Fixed, TokenLayout
from rainfusion.core import ops
from rainfusion.testing import cases, inputs, oracle
from rainfusion.testing.cases import Case
from rainfusion.testing.numbers import rounded
from rainfusion.testing.observation import Observation, verdict
from rainfusion.testing.observe import with_output
from rainfusion.testing.target import find_target

DTYPES = ("float32", "float16", "bfloat16")
LARGEST = (5, 27, 65, 136, 271)  # of the logits
PEAK_OF_NORMAL = 5.43  # the largest logit of the case's normal inputs


@pytest.fixture(params=[(largest, dtype) for largest in LARGEST for dtype in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}")
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """A case whose logits reach about that far."""
    largest, dtype = request.param
    factor = (largest / PEAK_OF_NORMAL) ** 0.5

    def recipe(case: Case, rng: np.random.Generator) -> inputs.Inputs:
        q, k, v = inputs.normal(case, rng)
        return q * factor, k * factor, v

    monkeypatch.setitem(inputs.RECIPES, "wide", recipe)
    problem = AttentionProblem(1, 4, 512, 512, 64, dtype)
    yield Case(f"wide {largest}", problem, TokenLayout(block=64), Fixed(), values="wide", seed=3)
    cases._inputs.cache_clear()


def share_of_limit(case: Case, out: Any) -> float:
    right = oracle.expected(case, case.mask())
    error = np.abs(np.asarray(out).astype(np.float64) - right.out)
    return float(np.where(np.isnan(error), np.inf, error).max()) / right.out_limit


def largest_logit(case: Case) -> float:
    q, k, _ = case.inputs()
    return float(np.abs(q @ k.swapaxes(2, 3)).max()) * case.problem.scale


def attend(case: Case, *, logits: Callable[[Any], Any] = lambda s: s, weights: Any = None, peak: bool = True) -> Any:
    """Masked attention in float32 with one thing about it changed, rounded to the dtype."""
    q, k, v = (x.astype(np.float32) for x in case.inputs())
    keep = case.mask().blocks.repeat(64, axis=2).repeat(64, axis=3)
    s = np.where(keep, logits(q @ k.swapaxes(2, 3) * np.float32(case.problem.scale)), -np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        p = np.exp(s - (s.max(axis=-1, keepdims=True) if peak else np.float32(0)))
        out = (p if weights is None else weights(p)) @ v / p.sum(axis=-1, keepdims=True)
    return rounded(out, case.problem.dtype)


def in_bfloat16(x: Any) -> Any:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def in_fp8(p: Any) -> Any:
    return (p * 256).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / 256


def in_int8(p: Any) -> Any:
    return np.rint(p * 127) / np.float32(127)


@pytest.mark.parametrize("backend", ["reference", "torch", "openvino"])
def test_right_backends_pass_with_room(wide: Case, backend: str) -> None:
    dtype = ml_dtypes.bfloat16 if wide.problem.dtype == "bfloat16" else wide.problem.dtype
    tensors = [x.astype(dtype) for x in wide.inputs()]
    assert share_of_limit(wide, rainfusion.attention(*tensors, mask=wide.mask(), block=64, backend=backend)) < 0.75


def test_weights_of_16_bits_pass_with_room(wide: Case) -> None:
    dtype = wide.problem.dtype
    weights = None if dtype == "float32" else lambda p: rounded(p, dtype).astype(np.float32)
    assert share_of_limit(wide, attend(wide, weights=weights)) < 0.75


def test_logits_of_16_bits_fail(wide: Case) -> None:
    assert share_of_limit(wide, attend(wide, logits=in_bfloat16)) > 1


def test_a_softmax_without_its_maximum_fails_where_it_overflows(wide: Case) -> None:
    share = share_of_limit(wide, attend(wide, peak=False))
    if largest_logit(wide) > 100:
        assert share == np.inf
    else:  # float32 holds exp(88): it is right, and passes
        assert share < 0.75


def test_weights_of_8_bits_fail(wide: Case) -> None:
    assert share_of_limit(wide, attend(wide, weights=in_fp8)) > 1
    # int8 has the resolution of bfloat16 for the weights that count where few do: no worst error tells them apart.
    is_as_fine = wide.problem.dtype == "bfloat16" and largest_logit(wide) > 50
    assert is_as_fine or share_of_limit(wide, attend(wide, weights=in_int8)) > 1


# -- 8 bits: what kernels elsewhere got wrong -------------------------------------------------------


def changed(plan: rainfusion.Plan, name: str, **fields: Any) -> rainfusion.Plan:
    """A plan in which the operation that makes a value differs."""
    return replace(plan, ops=tuple(replace(op, **fields) if name in op.makes else op for op in plan.ops))


class Saturating(ops.AttendQuantised):
    """Weights scaled beyond what e4m3 holds, as where a running maximum lags behind."""

    def weights(self, weights: Any, xp: Any) -> Any:
        return np.minimum(super().weights(weights, xp), np.float32(448 / 1024))


def as_kind(plan: rainfusion.Plan, kind: type[ops.AttendQuantised]) -> rainfusion.Plan:
    """A plan whose attention is another operation."""
    attend = plan.find(ops.AttendQuantised)
    other = kind(**{f.name: getattr(attend, f.name) for f in fields(kind)})
    return replace(plan, ops=tuple(other if op is attend else op for op in plan.ops))


WRONG_IN_8_BITS: dict[str, tuple[str, Callable[[rainfusion.Plan], rainfusion.Plan]]] = {
    "queries in FP8 for INT8": ("int8_wide_logits", lambda p: changed(p, "%q8", format="e4m3")),
    "keys with their mean": ("fp8_common_part", lambda p: changed(p, "%k8", centred=False)),
    "values with their mean": ("fp8_common_part", lambda p: changed(p, "%v8", centred=False)),
    "no rotation": ("int8_rotated", lambda p: changed(changed(p, "%q8", rotated=False), "%k8", rotated=False)),
    "weights that saturate": ("fp8_wide_logits", lambda p: as_kind(p, Saturating)),
    "weights that saturate where attention is diffuse": ("int8", lambda p: as_kind(p, Saturating)),
    "a lost centre": ("fp8_common_part", lambda p: changed(p, "%kept", centre=None)),
}


@pytest.mark.parametrize("name", ["int8", "fp8_wide_logits", "fp8_sink_block", "int8_common_part", "int8_rotated"])
def test_exact_attention_passes_for_8_bits(name: str) -> None:
    (case,) = (case for case in cases.builtin_cases() if case.name == f"{name}-bf16")
    assert verdict(seen_in_8_bits(case, replace(case, precision=None, rotate=False))) == []


def seen_in_8_bits(case: Case, run: Case, change: Any = None) -> Observation:
    mask, target = case.mask(), find_target("reference")
    plan = run.plan(policy=Fixed(), returns=("%out", "%lse"))
    return with_output(
        Observation("attend", case.name), case, mask, target.run(run, change(plan) if change else plan, mask)
    )


@pytest.mark.parametrize("name", WRONG_IN_8_BITS)
def test_other_roundings_than_planned_fail(name: str) -> None:
    of_case, change = WRONG_IN_8_BITS[name]
    (case,) = (case for case in cases.builtin_cases() if case.name == f"{of_case}-f32")
    assert verdict(seen_in_8_bits(case, case, change))
