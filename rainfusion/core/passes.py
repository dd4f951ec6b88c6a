"""Passes: functions from plan to plan. `rainfusion.core.planner.plan` is a composition of them.

Each adds one idea to the program and leaves the rest of it alone, so that passes compose in any order that has what
they need: a mask before its summaries, operations before their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from rainfusion.core import precision as precisions
from rainfusion.core.checks import as_instance, as_share, one_of, shown
from rainfusion.core.errors import LayoutError, PlanFormatError, PolicyError, ProblemError
from rainfusion.core.layout import Text, TokenLayout
from rainfusion.core.ops import (
    AllBlocks,
    Attend,
    AttendMeans,
    BlockMean,
    BlockScore,
    Constant,
    Data,
    Merge,
    Op,
    Quantise,
    Select,
    WindowOrder,
    signature,
)
from rainfusion.core.plan import Plan
from rainfusion.core.policies import Budget, Policy
from rainfusion.core.problem import AttentionProblem

Pass = TypeVar("Pass", bound=Callable[..., Plan])

_MOST_PAIRS, _MOST_BLOCKS = 2**38, 2**24


def _of_plan(function: Pass) -> Pass:
    """A pass that refuses, with a PlanFormatError, what is no plan."""

    @wraps(function)
    def checked(plan: Plan, *args: Any, **kwargs: Any) -> Plan:
        as_instance(plan, Plan, "plan", PlanFormatError, "rainfusion.plan")
        return function(plan, *args, **kwargs)

    return checked  # type: ignore[return-value]


def dense(problem: AttentionProblem, layout: TokenLayout) -> Plan:
    """Attention over every block pair: where every plan begins."""
    as_instance(problem, AttentionProblem, "problem", ProblemError)
    as_instance(layout, TokenLayout, "layout", LayoutError)
    attend = Attend(q="%q", k="%k", v="%v", out="%out", lse="%lse", block=layout.block, scale=problem.scale)
    return Plan(problem, layout, (attend,), ("%out",))


@_of_plan
def select_blocks(plan: Plan, policy: Policy, *, given_quotas: bool = False) -> Plan:
    """Attend only to the blocks that a policy's budget keeps; a policy that keeps everything leaves the plan dense.

    Args:
        given_quotas: read the row quotas at call time instead of the policy's.

    Raises:
        PolicyError: quotas at call time under a policy that chooses nothing by score, or a budget of other shape.
    """
    if not isinstance(policy, Policy):
        raise PolicyError(f"policy={shown(policy)} is not a policy; give one such as TopK(...)")
    q, kv = plan.q_axis, plan.kv_axis
    _refuse_huge_masks(plan)
    budget = policy.budget(q, kv, plan.problem.heads)
    if budget is None:
        if given_quotas:
            raise PolicyError(f"policy {policy} reads a mask, so quotas have no effect; give one of them")
        return given_mask(plan)
    budget = _checked(budget, plan, policy)
    if not given_quotas and (budget.quotas >= _candidates(budget, plan)).all():
        return plan
    mean_q = BlockMean(x="%q", mean="%qb", block=plan.block[0])
    mean_k = BlockMean(x="%k", mean="%kb", block=plan.block[1])
    prior = _prior(policy, plan)
    score = policy.score("%qb", "%kb", "%prior" if prior else None, score="%score", scale=plan.problem.scale)
    quotas = [] if given_quotas else [Constant(value="%quotas", data=Data(budget.quotas.astype(np.int32)))]
    chosen = Select(score="%score", quotas="%quotas", mask="%mask", q=q, kv=kv, mass=budget.mass, over=budget.over)
    masked = [replace(op, mask="%mask") if isinstance(op, Attend) else op for op in plan.ops]
    return replace(plan, ops=(mean_q, mean_k, *prior, score, *quotas, chosen, *masked))


@_of_plan
def given_mask(plan: Plan) -> Plan:
    """Attend by a mask that is given at call time."""
    return replace(plan, ops=tuple(replace(op, mask="%mask") if isinstance(op, Attend) else op for op in plan.ops))


@_of_plan
def summarise_omitted(plan: Plan) -> Plan:
    """Let every omitted block count through its means; a dense plan omits nothing and stays as it is."""
    attend = plan.find(Attend)
    if attend is None or attend.mask is None:
        return plan
    means = [
        BlockMean(x=x, mean=mean, block=plan.block[1])
        for x, mean in (("%k", "%kb"), ("%v", "%vb"))
        if plan.maker(mean) is None
    ]
    kept = replace(attend, out="%kept", lse="%kept_lse")
    rest = AttendMeans(
        q=attend.q,
        kb="%kb",
        vb="%vb",
        mask=attend.mask,
        out="%rest",
        lse="%rest_lse",
        block=attend.block,
        kv_len=plan.problem.kv_len,
        scale=attend.scale,
    )
    merge = Merge(out_a="%kept", lse_a="%kept_lse", out_b="%rest", lse_b="%rest_lse", out=attend.out, lse=attend.lse)
    at = plan.ops.index(attend)
    first_mean = next((i + 1 for i, op in enumerate(plan.ops) if "%kb" in op.makes), at)
    before, between, after = plan.ops[:first_mean], plan.ops[first_mean:at], plan.ops[at + 1 :]
    return precisions.means_quantised(replace(plan, ops=(*before, *means, *between, kept, rest, merge, *after)))


@_of_plan
def quantised(plan: Plan, precision: str, *, rotated: bool = False) -> Plan:
    """Attend in 8 bits. Blocks are still selected from the means of what is not quantised.

    Args:
        precision: ``"int8"``: queries and keys in INT8, values and softmax weights in e4m3; ``"fp8"``: all in e4m3.
            Queries and keys have a scale a block, values one a channel; keys and values are less their mean.
        rotated: Hadamard transform of queries and keys, for channels that are far larger than the others.

    Raises:
        ProblemError: another precision, or a head_dim that has no Hadamard transform.
        PlanFormatError: the plan is quantised already.
    """
    return precisions.quantised(plan, precision, rotated=rotated)


@_of_plan
def in_window_order(plan: Plan) -> Plan:
    """Walk tokens through the layout's order wherever operations read them, and write the output back through it."""
    if not (plan.q_axis.ordered or plan.kv_axis.ordered):
        return plan
    ops = tuple(_ordered(op, plan) for op in plan.ops)
    ops = tuple(precisions.in_order_of_reader(op, ops) if isinstance(op, Quantise) else op for op in ops)
    if ops == plan.ops:
        return plan
    return replace(plan, ops=(WindowOrder(order="%order", inverse="%inverse", layout=plan.layout), *ops))


@_of_plan
def limit_lengths(plan: Plan) -> Plan:
    """Read ``%kv_lengths`` at call time: tokens at block positions at or beyond a sample's length are padding."""
    on_queries = plan.problem.q_len == plan.problem.kv_len
    queries = {"%q", *(op.q for op in plan.ops if isinstance(op, Attend))}

    def of_queries(op: BlockMean | Quantise) -> bool:
        return not queries.isdisjoint((op.x, *op.makes))

    ops: list[Op] = []
    for op in plan.ops:
        if isinstance(op, Attend | AttendMeans):
            ops.append(replace(op, lengths="%kv_lengths", lengths_on_queries=on_queries))
        elif isinstance(op, Select) or (isinstance(op, BlockMean | Quantise) and (on_queries or not of_queries(op))):
            ops.append(replace(op, lengths="%kv_lengths"))
        else:
            ops.append(op)
    return replace(plan, ops=tuple(ops))


@_of_plan
def returning(plan: Plan, returns: Iterable[str]) -> Plan:
    """Return these values; those of the mask chain are made where the plan has no need of them itself.

    Raises:
        PlanFormatError: a value that the plan does not have, or no names.
    """
    names: tuple[Any, ...]
    try:
        names = tuple(returns)
    except Exception:  # not iterable, or an iterator that fails
        names = (returns,)
    if isinstance(returns, str) or not all(isinstance(name, str) for name in names):
        raise PlanFormatError(f"returns={shown(returns)} is not names of values; give such as ('%out', '%lse')")
    before: list[Op] = []
    after: list[Op] = []
    if "%mask" in names and plan.mask_name is None:
        shape = (plan.problem.batch, plan.problem.heads, plan.q_axis.blocks, plan.kv_axis.blocks)
        before.append(AllBlocks(mask="%mask", shape=shape))
    scored = "%score" in names and plan.maker("%score") is None
    for name, x, side in (("%qb", "%q", 0), ("%kb", "%k", 1)):
        if (scored or name in names) and plan.maker(name) is None:
            before.append(BlockMean(x=x, mean=name, block=plan.block[side]))
    if scored:
        after.append(BlockScore(qb="%qb", kb="%kb", score="%score", scale=plan.problem.scale))
    return replace(plan, ops=(*before, *plan.ops, *after), returns=names)


@_of_plan
def from_means(plan: Plan) -> Plan:
    """Start from block means given at call time, where tokens are elsewhere (a shard of them on each device)."""
    ops = tuple(op for op in plan.ops if not isinstance(op, BlockMean))
    return prune(replace(plan, ops=ops))


@_of_plan
def prune(plan: Plan) -> Plan:
    """Drop operations, and optional results, that nothing returned depends on."""
    needed, live = {*plan.returns}, []
    for op in reversed(plan.ops):
        if needed.intersection(op.makes):
            unread = {
                field: None for field, name in op.results.items() if name not in needed and _is_optional(op, field)
            }
            kept = replace(op, **unread) if unread else op  # type: ignore[arg-type]
            needed.update(kept.reads)
            live.append(kept)
    return replace(plan, ops=tuple(reversed(live)))


def _is_optional(op: Op, field: str) -> bool:
    return type(op).__dataclass_fields__[field].default is None and field in signature(type(op)).results


def _ordered(op: Op, plan: Plan) -> Op:
    """An operation that reads tokens, with the order to read them in."""
    if isinstance(op, BlockMean):
        axis = plan.q_axis if op.x == "%q" else plan.kv_axis
        return replace(op, order="%order") if axis.ordered and op.x in ("%q", "%k", "%v") else op
    if isinstance(op, Attend) and not (op.mask is None and (op.lengths is None or _tail_is_last(plan.layout))):
        order, inverse = ("%order", "%inverse") if plan.q_axis.ordered else (None, None)
        return replace(op, order=order, inverse=inverse, kv_order="%order" if plan.kv_axis.ordered else None)
    if isinstance(op, AttendMeans) and plan.q_axis.ordered:
        return replace(op, order="%order", inverse="%inverse")
    return op


def _tail_is_last(layout: TokenLayout) -> bool:
    """Whether the block order ends as the tokens do, so that dense attention needs no order to know padding."""
    return bool(layout.parts) and isinstance(layout.parts[-1], Text)


def _refuse_huge_masks(plan: Plan) -> None:
    """Refuse what no machine can hold before memory is touched, with a ProblemError."""
    p, q, kv = plan.problem, plan.q_axis, plan.kv_axis
    size = p.batch * p.heads * q.blocks * kv.blocks
    if size > _MOST_PAIRS or max(q.blocks, kv.blocks) > _MOST_BLOCKS:
        raise ProblemError(
            f"{q.blocks} x {kv.blocks} blocks for {p.batch * p.heads} heads need a mask of {size} bytes; at most "
            f"{_MOST_PAIRS} bytes and {_MOST_BLOCKS} blocks a side are planned. Use larger blocks"
        )


def _prior(policy: Policy, plan: Plan) -> list[Op]:
    prior = policy.prior(plan.q_axis, plan.kv_axis)
    if prior is None:
        return []
    wide = np.float64 if plan.problem.dtype == "float64" else np.float32
    array = _array(prior, "prior", policy, wide)
    blocks = (plan.q_axis.blocks, plan.kv_axis.blocks)
    if array.shape not in (blocks, (1, *blocks), (plan.problem.heads, *blocks)) or np.isnan(array).any():
        raise PolicyError(f"the prior of {policy} has shape {array.shape}; give numbers {list(blocks)}, or one a head")
    return [Constant(value="%prior", data=Data(array))]


def _checked(budget: Budget, plan: Plan, policy: Policy) -> Budget:
    """A policy's budget, quotas limited to what there is.

    Raises:
        PolicyError: it is no budget, or has quotas of another shape.
    """
    if not isinstance(budget, Budget):
        raise PolicyError(
            f"the budget of {policy} is a {type(budget).__name__}; give a Budget, or None for a given mask"
        )
    one_of(budget.over, ("free", "all"), f"over of {policy}'s budget", PolicyError)
    if budget.mass is not None:
        as_share(budget.mass, f"mass of {policy}'s budget", PolicyError, top=True)
    quotas, rows, heads = _array(budget.quotas, "quotas", policy), plan.q_axis.free_blocks, plan.problem.heads
    if quotas.shape not in ((1, rows), (heads, rows)) or quotas.dtype.kind not in "iu":
        raise PolicyError(
            f"the quotas of {policy} are {quotas.dtype} {quotas.shape}; give integers [{heads} or 1, {rows}], one for "
            "every unprotected query block"
        )
    return replace(budget, quotas=np.clip(quotas, 0, _candidates(budget, plan)))


def _array(values: Any, name: str, policy: Policy, dtype: Any = None) -> np.ndarray:
    try:
        array: np.ndarray = np.asarray(values, dtype=dtype)
    except Exception as error:  # ragged lists, text where numbers are due, tensors of a device
        raise PolicyError(f"the {name} of {policy}, {shown(values)}, are no NumPy array: {shown(error)}") from error
    return array


def _candidates(budget: Budget, plan: Plan) -> int:
    """The columns out of which a row's quota is taken."""
    return plan.kv_axis.free_blocks if budget.over == "free" else plan.kv_axis.blocks
