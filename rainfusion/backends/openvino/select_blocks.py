"""The graphs of `block_score` and `select`: scores, and the best columns of every row; ties to the lower index. All in
float32.

One graph serves all plans that choose in one way: sizes and quotas come with the call. What a mask has beyond ranked
columns, NumPy writes (`mask_chain.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rainfusion.backends.openvino.processes import per_process
from rainfusion.backends.openvino.runtime import Requests
from rainfusion.backends.openvino.vendor import op, ov
from rainfusion.core.backend import Device

_F32, _I64 = ov.Type.f32, ov.Type.i64
_LAST = -1


class SelectionModel(NamedTuple):
    """Which graph.

    Attributes:
        scores: it makes the score from block means; else it reads it.
        prior: what is added to the score is an input.
        ranks: it ranks columns; else it returns the score.
        mass: columns are taken until they reach a share of the softmax mass.
        padded: some columns have no tokens.
    """

    scores: bool = True
    prior: bool = False
    ranks: bool = True
    mass: bool = False
    padded: bool = False


class _Inputs(dict[str, ov.Node]):
    """The inputs of a graph by name, made when they are first asked for."""

    def __missing__(self, name: str) -> ov.Node:
        kind, shape = _KINDS[name]
        self[name] = made = op.parameter(shape, kind, name)
        return made


_KINDS = {
    "scale": (_F32, [1]),
    "query_means": (_F32, [-1] * 4),
    "key_means": (_F32, [-1] * 4),
    "prior": (_F32, [-1] * 4),
    "shape": (_I64, [4]),
    "score": (_F32, [-1] * 4),
    "absent": (ov.Type.boolean, [-1] * 4),
    "most": (_I64, []),
    "free": (_I64, [1]),
    "mass": (_F32, [1]),
    "log_counts": (_F32, [-1] * 4),
}


@per_process
def selection_requests(model: SelectionModel, device: Device) -> tuple[Requests, tuple[str, ...]]:
    """Compiled requests for a graph on a device, and the names of its inputs in order."""
    graph, names = selection_graph(model)
    return Requests(graph, device, _F32, 1), names


def selection_graph(model: SelectionModel) -> tuple[ov.Model, tuple[str, ...]]:
    """The graph and the names of its inputs, of these:

    scale ``[1]``; query_means ``[B, KV heads, group * rows, D]``; key_means ``[B, KV heads, columns, D]``; prior
    ``[1, H or 1, rows, columns]``; shape: that of the score ``[B, H, rows, columns]``; absent: columns without tokens,
    ``[B, 1, 1, columns]``; most: columns to rank; free: leading columns that are ranked where a mass is to be reached,
    the others being protected; mass: that share; log_counts: of the tokens in columns, ``[B or 1, 1, 1, columns]``.

    Outputs: the score, or the ranked columns, int32 ``[B, H, rows, most]``, and with a mass, bool, whether they are
    among the fewest that reach it.
    """
    inputs = _Inputs()
    score = _score(inputs, model) if model.scores else inputs["score"]
    results = [score]
    if model.ranks:
        score = op.select(op.is_nan(score), _const(-np.inf), score)
        if model.padded:
            score = op.select(inputs["absent"], _const(-np.inf), score)
        results = _reaching(score, inputs) if model.mass else [_best_first(score, inputs["most"])]
    return ov.Model(results, list(inputs.values()), "block selection"), tuple(inputs)


def _score(inputs: _Inputs, model: SelectionModel) -> ov.Node:
    # The scale is no constant: that would be folded into the means and round the scores another way.
    product = op.multiply(op.matmul(inputs["query_means"], inputs["key_means"], False, True), inputs["scale"])
    score = op.reshape(product, inputs["shape"], False)
    return op.add(score, inputs["prior"]) if model.prior else score


def _reaching(score: ov.Node, inputs: _Inputs) -> list[ov.Node]:
    """Ranked unprotected columns, and whether they are among the fewest that, with protected ones, reach the mass."""
    columns = _best_first(_first(score, inputs["free"]), inputs["most"])
    # An infinite score takes all the mass.
    logits = op.minimum(op.add(score, inputs["log_counts"]), _const(np.finfo(np.float32).max))
    peak = op.reduce_max(logits, _axis(_LAST), True)
    weights = op.exp(op.subtract(logits, op.select(op.is_finite(peak), peak, _const(0.0))))
    total = op.reduce_sum(weights, _axis(_LAST), True)
    ranked = op.gather_elements(_first(weights, inputs["free"]), columns, axis=_LAST)
    before = op.cumsum(ranked, op.constant(np.int64(_LAST)), exclusive=True)
    protected = op.reduce_sum(_rest(weights, inputs["free"]), _axis(_LAST), True)
    wanted = op.less(op.add(before, protected), op.multiply(total, inputs["mass"]))
    return [columns, wanted.output(0)]


def _best_first(score: ov.Node, count: ov.Node) -> ov.Node:
    """Columns of the `count` highest scores, int32; a stable sort gives ties to the lower index."""
    return op.topk(score, count, _LAST, "max", "value", "i32", stable=True).output(1)


def _first(x: ov.Node, count: ov.Node) -> ov.Node:
    return op.slice(x, _axis(0), count, _axis(1), _axis(_LAST))


def _rest(x: ov.Node, start: ov.Node) -> ov.Node:
    return op.slice(x, start, _axis(np.iinfo(np.int64).max), _axis(1), _axis(_LAST))


def _axis(value: int) -> ov.Node:
    return op.constant(np.array([value], np.int64))


def _const(value: object) -> ov.Node:
    return op.constant(np.asarray(value, np.float32))
