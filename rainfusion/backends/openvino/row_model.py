"""The graph that attends: gathered keys and values, two matrix products, a softmax.

One graph serves every plan of a head dim and dtype: all lengths are dynamic, token order, tensor layout
and grouped heads are in the row numbers it gathers by, so ragged rows need no padding.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import openvino as ov
from openvino import opset13 as op

from rainfusion.backends.openvino.runtime import Requests, parallel_streams
from rainfusion.core.backend import Device

ROWS = 0  # the axis of a table along which tokens lie


class RowModel(NamedTuple):
    """Which attention graph.

    Attributes:
        head_dim: channels.
        element: type of q, k, v and the output; float32, or a 16-bit type the device computes in.
        lse: it also returns the log-sum-exp.
        summary: every row also attends to one mean key and value for each block it skips.
    """

    head_dim: int
    element: ov.Type
    lse: bool = False
    summary: bool = False


class _Attended(NamedTuple):
    """Keys and values of a request, ``[n, K, D]``, and what is added to their logits."""

    keys: ov.Output
    values: ov.Output
    bias: ov.Output | None


@cache
def row_requests(model: RowModel, device: Device) -> Requests:
    """Compiled requests for a graph on a device: one core each where the device has several."""
    streams = parallel_streams(device)
    return Requests(row_graph(model), device, model.element, streams)


def row_graph(model: RowModel) -> ov.Model:
    """Inputs: scale, the tables q ``[rows, D]``, k and v ``[rows, run * D]`` (and those of the block means), row
    numbers ``[n, L]`` of queries, ``[n, K / run]`` of keys and values (and ``[n, S]``, logit bias ``[n, 1, K + S]``).
    Outputs: ``[n, L, D]`` and, with `lse`, float32 ``[n, L, 1]``.
    """
    # A constant scale would be moved through the gather and multiply whole tables in every request.
    scale = op.parameter([1, 1, 1], ov.Type.f32, "scale")
    widths = (model.head_dim, -1, -1)
    tables = [op.parameter([-1, width], model.element, name) for width, name in zip(widths, "qkv", strict=True)]
    of_q, of_kv = (op.parameter([-1, -1], ov.Type.i32, f"rows_of_{name}") for name in ("q", "kv"))
    pairs = zip(tables, (of_q, of_kv, of_kv), strict=True)
    query, keys, values = (gathered(table, numbers, model.head_dim) for table, numbers in pairs)
    inputs = [scale, *tables, of_q, of_kv]
    attended = _Attended(keys, values, None)
    if model.summary:
        attended, inputs = _with_summary(attended, model.head_dim, inputs)
    logits = _logits(query, attended, scale, model.element)
    # In 16 bits the plugin fuses a plain softmax with both products; float32 is faster by its parts.
    by_parts = model.lse or model.element == ov.Type.f32
    results = _softmax_product_and_lse(logits, attended) if by_parts else [_softmax_product(logits, attended)]
    results[0] = op.convert(results[0], model.element)
    return ov.Model(results[: 1 + model.lse], inputs, "attention rows")


def _logits(query: ov.Node, attended: _Attended, scale: ov.Node, element: ov.Type) -> ov.Node:
    if element == ov.Type.f32:
        logits = op.matmul(op.multiply(query, scale), attended.keys, False, True)
    else:  # a scaled query would be rounded to 16 bits once more
        logits = op.multiply(op.matmul(query, attended.keys, False, True), scale)
    return logits if attended.bias is None else op.add(logits, attended.bias)


def gathered(table: ov.Node, numbers: ov.Node, head_dim: int) -> ov.Node:
    """Tokens ``[n, tokens, D]`` in float32, from the rows of that number, each of which holds one or more."""
    rows = op.gather(table, numbers, op.constant(np.int64(ROWS)))
    # Between the two, the reshape keeps the conversion out of the gather, where it is ten times slower.
    tokens = op.reshape(rows, op.constant(np.array([0, -1, head_dim], np.int64)), special_zero=True)
    # The conversion keeps the logits float32 where the products are 16 bit.
    return op.convert(tokens, ov.Type.f32)


def _with_summary(kept: _Attended, head_dim: int, inputs: list[ov.Node]) -> tuple[_Attended, list[ov.Node]]:
    means = [op.parameter([-1, head_dim], ov.Type.f32, f"mean_{name}") for name in ("k", "v")]
    numbers = op.parameter([-1, -1], ov.Type.i32, "skipped")
    bias = op.parameter([-1, 1, -1], ov.Type.f32, "bias")
    keys, values = (
        op.concat([tokens, gathered(mean, numbers, head_dim)], axis=1)
        for tokens, mean in zip((kept.keys, kept.values), means, strict=True)
    )
    tables, rows = inputs[:4], inputs[4:]
    return _Attended(keys, values, bias), [*tables, *means, *rows, numbers, bias]


def _softmax_product(logits: ov.Node, attended: _Attended) -> ov.Node:
    """The form that the CPU plugin fuses into one kernel, whose logits never leave the cache."""
    return op.matmul(op.softmax(logits, -1), attended.values, False, False)


def _softmax_product_and_lse(logits: ov.Node, attended: _Attended) -> list[ov.Node]:
    """The same by its parts, of which the log-sum-exp is made; the division comes last, where rows are short."""
    last = op.constant(np.array([-1], np.int64))
    peak = op.reduce_max(logits, last, True)
    weights = op.exp(op.subtract(logits, peak))
    total = op.reduce_sum(weights, last, True)
    # No weight exceeds 1, except that this exp makes infinity of NaN.
    lse = op.select(op.is_finite(total), op.add(op.log(total), peak), op.constant(np.float32(np.nan)))
    return [op.divide(op.matmul(weights, attended.values, False, False), total), lse]
