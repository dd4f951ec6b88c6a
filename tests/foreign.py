"""What somebody outside the package might write: operations, a pass that inserts them, a policy. Public names only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from array_api_compat import array_namespace

from rainfusion import Budget, Plan, Policy, TopK
from rainfusion.core.ops import Attend, AttendMeans, BlockMean, BlockScore, Merge, Op, Select, operand, result


@dataclass(frozen=True, kw_only=True)
class ScaleScores(Op):
    """Scores times a factor, and columns of odd index lowered: changes which blocks are selected."""

    name: ClassVar[str] = "test_scale_scores"
    score: str = operand()
    scaled: str = result()
    factor: float = -1.0

    def meaning(self, score):
        xp = array_namespace(score)
        return score * xp.asarray(self.factor, dtype=score.dtype)


@dataclass(frozen=True, kw_only=True)
class ScaleTokens(Op):
    """Any values times a factor."""

    name: ClassVar[str] = "test_scale_tokens"
    x: str = operand()
    y: str = result()
    factor: float = 0.5

    def meaning(self, x):
        return x * self.factor


@dataclass(frozen=True, kw_only=True)
class DropFirstColumn(Op):
    """A mask without its first key block, but for rows that keep no other."""

    name: ClassVar[str] = "test_drop_first_column"
    mask: str = operand()
    thinner: str = result()

    def meaning(self, mask):
        xp = array_namespace(mask)
        first = xp.arange(mask.shape[-1]) == 0 if xp.__name__.endswith("numpy") else None
        if first is None:
            first = xp.arange(mask.shape[-1], device=mask.device) == 0
        alone = xp.sum(mask, axis=-1, keepdims=True, dtype=xp.int32) < 2
        return mask & (~first | alone)


def insert_after(plan: Plan, kind: type[Op], field: str, make) -> Plan:
    """A pass: put ``make(old, new)`` behind the first operation of a type and let what follows read its result."""
    ops, renamed = [], None
    for op in plan.ops:
        if renamed is not None:
            swapped = {f: renamed[1] for f, name in op.operands.items() if name == renamed[0]}
            ops.append(replace(op, **swapped) if swapped else op)
            continue
        ops.append(op)
        if isinstance(op, kind):
            renamed = getattr(op, field), f"{getattr(op, field)}_foreign"
            ops.append(make(*renamed))
    returns = tuple(renamed[1] if renamed and name == renamed[0] and name != "%out" else name for name in plan.returns)
    return replace(plan, ops=tuple(ops), returns=returns)


def insert_before(plan: Plan, value: str, make) -> Plan:
    """A pass: put ``make(value, new)`` in front, so that everything reads the new value instead of a given one."""
    new = f"{value}_foreign"
    ops = [
        replace(op, **swapped) if (swapped := {f: new for f, name in op.operands.items() if name == value}) else op
        for op in plan.ops
    ]
    return replace(plan, ops=(make(value, new), *ops))


def scaled_scores(plan: Plan) -> Plan:
    return insert_after(plan, BlockScore, "score", lambda old, new: ScaleScores(score=old, scaled=new))


def scaled_key_means(plan: Plan) -> Plan:
    ops = [op for op in plan.ops if isinstance(op, BlockMean) and op.x == "%k"]
    if not ops:
        return plan
    return insert_after(plan, type(ops[0]), "mean", lambda old, new: ScaleTokens(x=old, y=new))


def thinner_masks(plan: Plan) -> Plan:
    if plan.find(Select):
        return insert_after(plan, Select, "mask", lambda old, new: DropFirstColumn(mask=old, thinner=new))
    if plan.takes("%mask"):
        return insert_before(plan, "%mask", lambda old, new: DropFirstColumn(mask=old, thinner=new))
    return plan


def scaled_values(plan: Plan) -> Plan:
    return insert_before(plan, "%v", lambda old, new: ScaleTokens(x=old, y=new))


def scaled_output(plan: Plan) -> Plan:
    """The output scaled at the end: whatever makes ``%out`` makes another value, and the new operation ``%out``."""
    last = [op for op in plan.ops if "%out" in op.makes][-1]
    assert isinstance(last, Attend | AttendMeans | Merge)
    ops = tuple(replace(op, out="%unscaled") if op is last else op for op in plan.ops)
    return replace(plan, ops=(*ops, ScaleTokens(x="%unscaled", y="%out")))


PASSES = (scaled_scores, scaled_key_means, thinner_masks, scaled_values, scaled_output)


@dataclass(frozen=True)
class OwnBlockFirst(Policy):
    """Every query block keeps its own key block, then the best others; head h keeps more than head h - 1."""

    sparsity: float = 0.7

    def budget(self, q, kv, heads):
        shares = tuple(self.sparsity * (1 - 0.5 * h / heads) for h in range(heads))
        return TopK(shares).budget(q, kv, heads)

    def prior(self, q, kv):
        prior = np.zeros((q.blocks, kv.blocks), np.float32)
        own = np.arange(min(q.blocks, kv.blocks))
        prior[own, own] = np.inf
        return prior


__all__ = ["PASSES", "Budget", "OwnBlockFirst"]
