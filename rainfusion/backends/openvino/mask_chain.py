"""The mask chain as one graph: block means, scores, selection; float32 whatever the tensors are.

A block mean is the sum of a bag of table rows (an embedding bag): the token order, the tensor layout and
a ragged last block are all in the bags' row numbers, and no reordered copy of q or k is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import openvino as ov
from openvino import opset13 as op

from rainfusion.backends.openvino.runtime import Requests, compiled
from rainfusion.backends.openvino.select_blocks import select
from rainfusion.backends.openvino.tensors import ELEMENTS, Rows, rows_of
from rainfusion.core.backend import Device, Segment
from rainfusion.core.ir import Op, Plan
from rainfusion.core.layout import BlockedAxis, TokenLayout

MASK_CHAINS = (
    ("block_mean", "block_mean", "block_score", "select"),
    ("block_mean", "block_mean", "block_mean", "block_score", "select"),
    ("block_mean", "block_mean"),
)
_F32 = ov.Type.f32


def build_mask_chain(segment: Segment, plan: Plan, device: Device) -> Callable[..., tuple[np.ndarray, ...]]:
    """The kernel: from q, k (and v) to the mask and block means that ``segment.outputs`` names."""
    graph = _Graph(plan)
    for operation in segment.ops:
        graph.add(operation)
    model = graph.model(segment.outputs)
    shapes = [(tuple(output.shape), output.element_type.to_dtype()) for output in model.outputs]
    requests = Requests(compiled(model, device, _F32, 1), 1)
    scale = np.array([plan.problem.scale], np.float32)
    bags = lru_cache(maxsize=8)(lambda source, strides: source.bags(strides))

    def run(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        values = dict(zip(segment.inputs, arrays, strict=True))
        tables = [rows_of(values[source.name]) for source in graph.sources]
        numbers = [bags(source, rows.strides) for source, rows in zip(graph.sources, tables, strict=True)]
        results = [np.empty(shape, dtype) for shape, dtype in shapes]
        requests.run((), [([scale, *(rows.table for rows in tables), *numbers], results)])
        return tuple(results)

    return run


class _Source(NamedTuple):
    """A tensor whose blocks are averaged, in the order of `layout` where it has one."""

    name: str
    axis: BlockedAxis
    layout: TokenLayout | None
    batch: int
    heads: int

    def bags(self, strides: tuple[int, int, int]) -> np.ndarray:
        """Row numbers of all its tokens, head after head in block order, int32 ``[B * H * tokens]``."""
        order = self.layout.order if self.layout else None
        tokens = np.arange(self.axis.length) if order is None else order
        return Rows(np.empty((0, 0)), strides).numbers(tokens, self.batch, self.heads)


class _Graph:
    """Operations of a plan as OpenVINO nodes, added one by one; `values` are the nodes by their names in the plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sources: list[_Source] = []
        self.values: dict[str, ov.Node] = {}
        self._tables: list[ov.Node] = []
        self._bags: list[ov.Node] = []
        # A parameter, because a constant would be folded into the means and round the scores another way.
        self._scale = op.parameter([1], _F32, "scale")

    def add(self, operation: Op) -> None:
        """Add one operation; its operands are there already."""
        meaning = {"block_mean": self._block_mean, "block_score": self._block_score, "select": self._select}
        self.values[operation.outs[0]] = meaning[operation.name](operation)

    def model(self, outputs: tuple[str, ...]) -> ov.Model:
        """Inputs: scale, a table ``[rows, D]`` each source, its row numbers each source. Outputs: as named."""
        inputs = [self._scale, *self._tables, *self._bags]
        return ov.Model([self.values[name] for name in outputs], inputs, "mask chain")

    def _block_mean(self, operation: Op) -> ov.Node:
        name, order = operation.args
        p = self.plan.problem
        axis, heads = (self.plan.q_axis, p.heads) if name == "%q" else (self.plan.kv_axis, p.kv_heads)
        source = _Source(str(name), axis, self.plan.layout if order else None, p.batch, heads)
        table = op.parameter([-1, p.head_dim], ELEMENTS[p.dtype], f"table_of_{name}")
        bags = op.parameter([p.batch * heads * axis.length], ov.Type.i32, f"bags_of_{name}")
        self.sources.append(source)
        self._tables.append(table)
        self._bags.append(bags)
        starts = np.arange(p.batch * heads)[:, None] * axis.length + np.arange(axis.blocks) * axis.block
        sums = op.embedding_bag_offsets_sum(op.convert(table, _F32), bags, op.constant(starts.ravel().astype(np.int32)))
        folded = op.reshape(sums, op.constant(np.array([p.batch, heads, axis.blocks, p.head_dim])), False)
        return op.divide(folded, op.constant(axis.counts.astype(np.float32)[:, None]))

    def _block_score(self, operation: Op) -> ov.Node:
        queries, keys = (self.values[str(name)] for name in operation.args)
        p = self.plan.problem
        grouped = [p.batch, p.kv_heads, p.group * self.plan.q_axis.blocks, p.head_dim]
        rows = op.reshape(queries, op.constant(np.array(grouped)), False)
        scores = op.multiply(op.matmul(rows, keys, False, True), self._scale)
        shape = [p.batch, p.heads, self.plan.q_axis.blocks, self.plan.kv_axis.blocks]
        return op.reshape(scores, op.constant(np.array(shape)), False)

    def _select(self, operation: Op) -> ov.Node:
        return select(self.values[str(operation.args[0])], self.plan)
