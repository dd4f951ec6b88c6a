"""The mask chain: block means a few blocks a request, then scores and selection as one small graph; all in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as op

from rainfusion.backends.openvino.block_means import BlockMeans
from rainfusion.backends.openvino.runtime import Requests
from rainfusion.backends.openvino.select_blocks import select
from rainfusion.core.backend import Device, Segment
from rainfusion.core.ir import Op, Plan

_MEANS = "block_mean"
MASK_CHAINS = (
    (_MEANS, _MEANS, "block_score", "select"),
    (_MEANS, _MEANS, _MEANS, "block_score", "select"),
    (_MEANS, _MEANS),
)
_F32 = ov.Type.f32


def build_mask_chain(segment: Segment, plan: Plan, device: Device) -> Callable[..., tuple[np.ndarray, ...]]:
    """The kernel: from q, k (and v) to the mask and block means that ``segment.outputs`` names."""
    means = [(made, _block_means(made, plan, device)) for made in segment.ops if made.name == _MEANS]
    selection = [operation for operation in segment.ops if operation.name != _MEANS]
    selected = _Selected(selection, plan, device) if selection else None

    def run(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        values = dict(zip(segment.inputs, arrays, strict=True))
        for operation, mean in means:
            values[operation.outs[0]] = mean(values[str(operation.args[0])])
        if selected:
            values[selected.result] = selected(values)
        return tuple(values[name] for name in segment.outputs)

    return run


def _block_means(operation: Op, plan: Plan, device: Device) -> BlockMeans:
    source, order = operation.args
    axis = plan.q_axis if source == "%q" else plan.kv_axis
    return BlockMeans(axis, plan.layout.order if order else None, device)


class _Selected:
    """`block_score` and `select` of a plan as a graph."""

    def __init__(self, operations: Sequence[Op], plan: Plan, device: Device) -> None:
        score, choice = operations
        self._means = [str(name) for name in score.args]
        self.result = choice.outs[0]
        self._scale = np.array([plan.problem.scale], np.float32)
        self._requests = Requests(_selection_graph(plan), device, _F32, 1)

    def __call__(self, values: dict[str, np.ndarray]) -> np.ndarray:
        queries, keys = (values[name] for name in self._means)
        mask = np.empty((*queries.shape[:3], keys.shape[2]), bool)
        self._requests.run((), [([self._scale, queries, keys], [mask])])
        return mask


def _selection_graph(plan: Plan) -> ov.Model:
    """Inputs: scale, block means of the queries and keys ``[B, H or fewer, blocks, D]``. Output: the mask, bool."""
    p, q, kv = plan.problem, plan.q_axis, plan.kv_axis
    # A parameter, because a constant would be folded into the means and round the scores another way.
    scale = op.parameter([1], _F32, "scale")
    queries = op.parameter([p.batch, p.heads, q.blocks, p.head_dim], _F32, "query_means")
    keys = op.parameter([p.batch, p.kv_heads, kv.blocks, p.head_dim], _F32, "key_means")
    grouped = op.reshape(queries, _shape(p.batch, p.kv_heads, p.group * q.blocks, p.head_dim), False)
    scores = op.multiply(op.matmul(grouped, keys, False, True), scale)
    score = op.reshape(scores, _shape(p.batch, p.heads, q.blocks, kv.blocks), False)
    return ov.Model([select(score, plan)], [scale, queries, keys], "block selection")


def _shape(*sizes: int) -> ov.Node:
    return op.constant(np.array(sizes))
