"""The `select` operation as a graph: exactly k (or a share of the mass), ties to the lower index, protection."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as op

from rainfusion.core.ir import Plan
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.policy import TopK, TopP

_F32 = ov.Type.f32
_LAST = -1


def select(score: ov.Node, plan: Plan) -> ov.Node:
    """The blocks to attend, bool like `score` (float32 ``[B, H, q blocks, key blocks]``), as `semantics.select`."""
    q, kv = plan.q_axis, plan.kv_axis
    score = op.select(op.is_nan(score), _const(-np.inf), score)
    free = _first(_first(score, q.free_blocks, 2), kv.free_blocks, 3)
    everything = op.broadcast(_const(1.0), op.shape_of(score))
    if not q.free_blocks or not kv.free_blocks:
        return op.convert(everything, ov.Type.boolean)
    if isinstance(plan.policy, TopK):
        kept = _top_k(free, plan.policy.row_quotas(q, kv))
    else:
        assert isinstance(plan.policy, TopP)
        kept = _top_p(_first(score, q.free_blocks, 2), free, plan.policy, kv)
    columns = op.concat([kept, _rest(_first(everything, q.free_blocks, 2), kv.free_blocks, 3)], axis=3)
    return op.convert(op.concat([columns, _rest(everything, q.free_blocks, 2)], axis=2), ov.Type.boolean)


def _top_k(score: ov.Node, quotas: np.ndarray) -> ov.Node:
    """1 for the quotas[i] highest columns of row i, else 0."""
    most = int(quotas.max())
    if not most:
        return op.multiply(op.broadcast(_const(1.0), op.shape_of(score)), _const(0.0))
    best = _best_first(score, most)
    within = (np.arange(most) < quotas[:, None]).astype(np.float32)
    return _scattered(score, best, op.broadcast(_const(within), op.shape_of(best)))


def _top_p(score: ov.Node, free: ov.Node, policy: TopP, kv: BlockedAxis) -> ov.Node:
    """1 for the smallest set of free columns that, with the protected ones, reaches the mass, else 0."""
    # An infinite score takes all the mass.
    logits = op.minimum(op.add(score, _const(np.log(kv.counts))), _const(np.finfo(np.float32).max))
    peak = op.reduce_max(logits, _axis(_LAST), True)
    finite = op.is_finite(peak)
    weights = op.exp(op.subtract(logits, op.select(finite, peak, _const(0.0))))
    total = op.reduce_sum(weights, _axis(_LAST), True)
    best = _best_first(free, kv.free_blocks)
    ranked = op.gather_elements(_first(weights, kv.free_blocks, 3), best, axis=_LAST)
    before = op.cumsum(ranked, op.constant(np.int64(_LAST)), exclusive=True)
    if kv.free_blocks < kv.blocks:
        before = op.add(before, op.reduce_sum(_rest(weights, kv.free_blocks, 3), _axis(_LAST), True))
    floor = op.constant(np.arange(kv.free_blocks) < policy.least(kv))
    wanted = op.logical_or(op.less(before, op.multiply(total, _const(policy.mass))), floor)
    return _scattered(free, best, op.convert(wanted, _F32))


def _best_first(score: ov.Node, count: int) -> ov.Node:
    """Columns of the `count` highest scores, int32; a stable sort gives ties to the lower index."""
    found = op.topk(score, op.constant(np.int64(count)), _LAST, "max", "value", "i32", stable=True)
    return found.output(1)


def _scattered(like: ov.Node, columns: ov.Node, values: ov.Node) -> ov.Node:
    zeros = op.broadcast(_const(0.0), op.shape_of(like))
    return op.scatter_elements_update(zeros, columns, values, op.constant(np.int64(_LAST)))


def _first(x: ov.Node, count: int, axis: int) -> ov.Node:
    return op.slice(x, _axis(0), _axis(count), _axis(1), _axis(axis))


def _rest(x: ov.Node, start: int, axis: int) -> ov.Node:
    return op.slice(x, _axis(start), _axis(np.iinfo(np.int64).max), _axis(1), _axis(axis))


def _axis(value: int) -> ov.Node:
    return op.constant(np.array([value], np.int64))


def _const(value: object) -> ov.Node:
    return op.constant(np.asarray(value, np.float32))
