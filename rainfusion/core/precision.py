"""Attention in 8 bits as a change of a plan: operands quantised, softmax weights rounded. `passes.quantised` is public.

INT8 queries and keys with FP8 values and weights are SageAttention 2's; the mean taken off keys and values, a scale for
a block of tokens and the rotation have their owners named in `ops.quantise`. Means of omitted blocks lie among the
tokens, so they are rounded around the same centre, and values with the same scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

from rainfusion.core.checks import as_flag, one_of
from rainfusion.core.errors import PlanFormatError, ProblemError, RainfusionError
from rainfusion.core.ops import Attend, AttendMeans, AttendMeansQuantised, AttendQuantised, Op, Quantise
from rainfusion.core.ops.rounding import is_power_of_two
from rainfusion.core.plan import Plan

AnyOp = TypeVar("AnyOp", bound=Op)

FORMATS: Mapping[str, str] = MappingProxyType({"int8": "int8", "fp8": "e4m3"})
"""The format of queries and keys in every precision; values and softmax weights are e4m3 in each."""


def checked(precision: Any, rotate: Any, error: type[RainfusionError] = ProblemError) -> tuple[str | None, bool]:
    """A precision, or None, and whether to rotate.

    Raises:
        error: another precision, no truth value, or a rotation without a precision.
    """
    one_of(precision, (None, *FORMATS), "precision", error)
    rotate = as_flag(rotate, "rotate", error)
    if rotate and precision is None:
        raise error("rotate=True has no effect without a precision; give precision='int8' or 'fp8', too")
    return precision, rotate


def quantised(plan: Plan, precision: str, *, rotated: bool = False) -> Plan:
    """What `passes.quantised` does."""
    one_of(precision, FORMATS, "precision", ProblemError)
    rotated = as_flag(rotated, "rotated", ProblemError)
    attend, dim, format = plan.find(Attend), plan.problem.head_dim, FORMATS[precision]
    if rotated and not is_power_of_two(dim):
        raise ProblemError(f"head_dim={dim} has no Hadamard transform, only a power of two has; leave out the rotation")
    if attend is None:
        return plan
    if isinstance(attend, AttendQuantised):
        raise PlanFormatError("the plan attends in 8 bits already; quantise a plan once")
    q = Quantise(
        x=attend.q,
        order=attend.order,
        lengths=attend.lengths if attend.lengths_on_queries else None,
        y="%q8",
        format=format,
        block=attend.block[0],
        rotated=rotated,
    )
    k = Quantise(
        x=attend.k,
        order=attend.kv_order,
        lengths=attend.lengths,
        y="%k8",
        y_centre="%kc",
        format=format,
        block=attend.block[1],
        centred=True,
        rotated=rotated,
    )
    v = Quantise(
        x=attend.v,
        order=attend.kv_order,
        lengths=attend.lengths,
        y="%v8",
        y_centre="%vc",
        y_scale="%vs",
        format="e4m3",
        by_channel=True,
        centred=True,
    )
    in_8_bits = _of_fields(AttendQuantised, attend, q="%q8", k="%k8", v="%v8", centre="%vc")
    return means_quantised(_replaced(plan, attend, q, k, v, in_8_bits))


def means_quantised(plan: Plan) -> Plan:
    """Where attention over tokens is in 8 bits, that over means in 8 bits, too; other plans stay as they are."""
    attend, rest = plan.find(Attend), plan.find(AttendMeans)
    if not isinstance(attend, AttendQuantised) or rest is None or isinstance(rest, AttendMeansQuantised):
        return plan
    k, v = plan.maker(attend.k), plan.maker(attend.v)
    if not isinstance(k, Quantise) or not isinstance(v, Quantise):
        return plan
    # `prune` may have dropped what nothing read
    named_k = replace(k, y_centre=k.y_centre or "%kc")
    named_v = replace(v, y_centre=v.y_centre or "%vc", y_scale=v.y_scale or "%vs")
    kb = Quantise(
        x=rest.kb,
        lengths=rest.lengths,
        centre=named_k.y_centre,
        y="%kb8",
        format=k.format,
        block=attend.block[1],
        rotated=k.rotated,
        tokens=rest.block[1],
    )
    vb = Quantise(
        x=rest.vb,
        lengths=rest.lengths,
        centre=named_v.y_centre,
        scale=named_v.y_scale,
        y="%vb8",
        format=v.format,
        by_channel=True,
        tokens=rest.block[1],
    )
    in_8_bits = _of_fields(AttendMeansQuantised, rest, q=attend.q, kb="%kb8", vb="%vb8", centre=named_v.y_centre)
    plan = _replaced(_replaced(plan, k, named_k), v, named_v)
    return _replaced(plan, rest, kb, vb, in_8_bits)


def in_order_of_reader(op: Quantise, ops: Iterable[Op]) -> Quantise:
    """Blocks that share a scale are those that attention reads."""
    for reader in ops:
        if isinstance(reader, Attend) and reader.q == op.y:
            return replace(op, order=reader.order)
        if isinstance(reader, Attend) and op.y in (reader.k, reader.v):
            return replace(op, order=reader.kv_order)
    return op


def _of_fields(kind: type[AnyOp], op: Op, **changes: str | None) -> AnyOp:
    """An operation of another type with the fields of `op` but for some."""
    return kind(**{**{f.name: getattr(op, f.name) for f in fields(op)}, **changes})


def _replaced(plan: Plan, op: Op, *others: Op) -> Plan:
    """A plan with other operations in the place of one."""
    at = plan.ops.index(op)
    return replace(plan, ops=(*plan.ops[:at], *others, *plan.ops[at + 1 :]))
