"""The `block_score` and `select` operations as a graph: exactly k, a share of the mass, or both; ties to the lower
index; protection. Everything is float32.

One graph serves all plans that select in one way: sizes, quotas and numbers of protected blocks are its inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import openvino as ov
from openvino import opset13 as op

from rainfusion.backends.openvino.processes import per_process
from rainfusion.backends.openvino.runtime import Requests
from rainfusion.core.backend import Device

_F32, _I32, _I64 = ov.Type.f32, ov.Type.i32, ov.Type.i64
_LAST = -1


class SelectionModel(NamedTuple):
    """Which selection graph.

    Attributes:
        scores: it makes the score from block means; else it reads it.
        prior: what is added to the score is an input.
        returns_score: the score is an output.
        selects: the mask is an output.
        mass: blocks are taken until they reach a share of the softmax mass.
        over_all: quotas are spent on all columns, protected ones among them.
        padded: some columns have no tokens.
        free_rows, free_columns: there are unprotected rows and columns.
    """

    scores: bool = True
    prior: bool = False
    returns_score: bool = False
    selects: bool = True
    mass: bool = False
    over_all: bool = False
    padded: bool = False
    free_rows: bool = True
    free_columns: bool = True

    @property
    def chooses(self) -> bool:
        """Whether the mask depends on the score."""
        return self.selects and self.free_rows and (self.free_columns or self.over_all)


class Inputs(dict[str, ov.Node]):
    """The inputs of a graph by name, made when they are first asked for."""

    _KINDS = {  # noqa: RUF012
        "scale": (_F32, [1]),
        "query_means": (_F32, [-1] * 4),
        "key_means": (_F32, [-1] * 4),
        "prior": (_F32, [-1] * 4),
        "score": (_F32, [-1] * 4),
        "shape": (_I64, [4]),
        "quotas": (_I32, [-1] * 4),
        "most": (_I64, []),
        "free": (_I64, [2]),
        "mass": (_F32, [1]),
        "log_counts": (_F32, [-1] * 4),
        "absent": (ov.Type.boolean, [-1] * 4),
    }

    def __missing__(self, name: str) -> ov.Node:
        kind, shape = self._KINDS[name]
        self[name] = made = op.parameter(shape, kind, name)
        return made


@per_process
def selection_requests(model: SelectionModel, device: Device) -> tuple[Requests, tuple[str, ...]]:
    """Compiled requests for a graph on a device, and the names of its inputs in order."""
    graph, names = selection_graph(model)
    return Requests(graph, device, _F32, 1), names


def selection_graph(model: SelectionModel) -> tuple[ov.Model, tuple[str, ...]]:
    """The graph and the names of its inputs, of these:

    scale ``[1]``; query_means ``[B, KV heads, group * q blocks, D]``; key_means ``[B, KV heads, key blocks, D]``; prior
    ``[1, H or 1, q blocks, key blocks]``; shape: that of score, bool mask ``[B, H, q blocks, key blocks]``; quotas
    ``[1, H or 1, free q blocks, 1]``, within the number of candidates; most: at least 1 and the largest of them; free:
    unprotected rows, columns; mass; log_counts: of the tokens in key blocks ``[B or 1, 1, 1, key blocks]``; absent: key
    blocks without any, alike.

    Outputs: the score, the mask, those of them that the model says.
    """
    inputs = Inputs()
    score = _score(inputs, model) if model.scores else inputs["score"]
    results = [score] if model.returns_score else []
    if model.selects:
        results.append(_mask(score, inputs, model))
    return ov.Model(results, list(inputs.values()), "block selection"), tuple(inputs)


def _score(inputs: Inputs, model: SelectionModel) -> ov.Node:
    # The scale is no constant: that would be folded into the means and round the scores another way.
    product = op.multiply(op.matmul(inputs["query_means"], inputs["key_means"], False, True), inputs["scale"])
    score = op.reshape(product, inputs["shape"], False)
    return op.add(score, inputs["prior"]) if model.prior else score


def _mask(score: ov.Node, inputs: Inputs, model: SelectionModel) -> ov.Node:
    if not model.chooses:
        return op.convert(op.broadcast(_const(1.0), inputs["shape"]), ov.Type.boolean)
    score = op.select(op.is_nan(score), _const(-np.inf), score)
    if model.padded:
        score = op.select(inputs["absent"], _const(-np.inf), score)
    free_rows, free_columns = (op.gather(inputs["free"], _axis(at), op.constant(np.int64(0))) for at in (0, 1))
    rows = _first(score, free_rows, 2)
    kept = _kept(rows, free_columns, inputs, model)
    everything = op.broadcast(_const(1.0), op.shape_of(score))
    columns = op.concat([kept, _rest(_first(everything, free_rows, 2), free_columns, 3)], axis=3)
    return op.convert(op.concat([columns, _rest(everything, free_rows, 2)], axis=2), ov.Type.boolean)


def _kept(rows: ov.Node, free_columns: ov.Node, inputs: Inputs, model: SelectionModel) -> ov.Node:
    """1 for the unprotected columns that unprotected rows keep, else 0."""
    if not model.mass:
        candidates = rows if model.over_all else _first(rows, free_columns, 3)
        return _first(_best(candidates, inputs), free_columns, 3) if model.over_all else _best(candidates, inputs)
    free = _first(rows, free_columns, 3)
    columns = _best_first(free, op.reduce_sum(free_columns, op.constant(np.int64(0)), False))
    wanted = _reaching(rows, free_columns, columns, inputs)
    if not model.over_all:
        return _scattered(free, columns, op.convert(op.logical_or(wanted, _within(columns, inputs)), _F32))
    reached = _scattered(free, columns, op.convert(wanted, _F32))
    return op.maximum(reached, _first(_best(rows, inputs), free_columns, 3))


def _best(score: ov.Node, inputs: Inputs) -> ov.Node:
    """1 for as many of the highest columns of every row as its quota says, else 0."""
    columns = _best_first(score, inputs["most"])
    return _scattered(score, columns, op.broadcast(op.convert(_within(columns, inputs), _F32), op.shape_of(columns)))


def _within(columns: ov.Node, inputs: Inputs) -> ov.Node:
    """Whether the place of ranked columns is within the quota of their row, ``[1, H or 1, rows, places]``."""
    count = op.gather(op.shape_of(columns), op.constant(np.int64(3)), op.constant(np.int64(0)))
    places = op.range(op.constant(np.int64(0)), count, op.constant(np.int64(1)), _I32)
    return op.less(places, inputs["quotas"])


def _reaching(rows: ov.Node, free_columns: ov.Node, columns: ov.Node, inputs: Inputs) -> ov.Node:
    """Whether ranked columns are among the fewest that, with the protected ones, reach the mass."""
    # An infinite score takes all the mass.
    logits = op.minimum(op.add(rows, inputs["log_counts"]), _const(np.finfo(np.float32).max))
    peak = op.reduce_max(logits, _axis(_LAST), True)
    weights = op.exp(op.subtract(logits, op.select(op.is_finite(peak), peak, _const(0.0))))
    total = op.reduce_sum(weights, _axis(_LAST), True)
    ranked = op.gather_elements(_first(weights, free_columns, 3), columns, axis=_LAST)
    before = op.cumsum(ranked, op.constant(np.int64(_LAST)), exclusive=True)
    protected = op.reduce_sum(_rest(weights, free_columns, 3), _axis(_LAST), True)
    return op.less(op.add(before, protected), op.multiply(total, inputs["mass"]))


def _best_first(score: ov.Node, count: ov.Node) -> ov.Node:
    """Columns of the `count` highest scores, int32; a stable sort gives ties to the lower index."""
    return op.topk(score, count, _LAST, "max", "value", "i32", stable=True).output(1)


def _scattered(like: ov.Node, columns: ov.Node, values: ov.Node) -> ov.Node:
    zeros = op.broadcast(_const(0.0), op.shape_of(like))
    return op.scatter_elements_update(zeros, columns, values, op.constant(np.int64(_LAST)))


def _first(x: ov.Node, count: ov.Node, axis: int) -> ov.Node:
    return op.slice(x, _axis(0), count, _axis(1), _axis(axis))


def _rest(x: ov.Node, start: ov.Node, axis: int) -> ov.Node:
    return op.slice(x, start, _axis(np.iinfo(np.int64).max), _axis(1), _axis(axis))


def _axis(value: int) -> ov.Node:
    return op.constant(np.array([value], np.int64))


def _const(value: object) -> ov.Node:
    return op.constant(np.asarray(value, np.float32))
