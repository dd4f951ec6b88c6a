"""The graph that attends: gathered keys and values, two matrix products, a softmax.

One graph serves every plan of a head dim and dtype: all lengths are dynamic; token order, tensor layout, padding
and grouped heads are in the numbers it gathers by, so ragged rows need no padding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rainfusion.backends.openvino.processes import per_process
from rainfusion.backends.openvino.runtime import Requests, parallel_streams
from rainfusion.backends.openvino.vendor import op, ov
from rainfusion.core.backend import Device

ENTRIES = 0  # the axis of a table along which tokens lie


class RowModel(NamedTuple):
    """Which attention graph.

    Attributes:
        head_dim: channels.
        element: type of q, k, v and the output; float32, or a 16-bit type the device computes in.
        lse: it also returns the log-sum-exp.
        summary: every row also attends to one mean key and value for each block it omits.
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


@per_process
def row_requests(model: RowModel, device: Device) -> Requests:
    """Compiled requests for a graph on a device: one core each where the device has several."""
    streams = parallel_streams(device)
    return Requests(row_graph(model), device, model.element, streams)


def row_graph(model: RowModel) -> ov.Model:
    """Inputs: scale, the tables q ``[tokens, D]``, k and v ``[entries, run * D]`` (and those of `split_means`), numbers
    ``[n, L]`` of queries, ``[n, K / run]`` of keys and values (and ``[n, S]`` of means, logit bias ``[n, 1, S]``).
    Outputs: ``[n, L, D]`` and, with `lse`, float32 ``[n, L, 1]``.
    """
    # A constant scale would be moved through the gather and multiply whole tables in every request.
    scale = op.parameter([1, 1, 1], ov.Type.f32, "scale")
    widths = (model.head_dim, -1, -1)
    tables = [op.parameter([-1, width], model.element, name) for width, name in zip(widths, "qkv", strict=True)]
    of_q, of_kv = (op.parameter([-1, -1], ov.Type.i32, f"numbers_of_{name}") for name in ("q", "kv"))
    pairs = zip(tables, (of_q, of_kv, of_kv), strict=True)
    query, keys, values = (gathered(table, numbers, model.head_dim) for table, numbers in pairs)
    inputs = [scale, *tables, of_q, of_kv]
    attended = _Attended(keys, values, None)
    if model.summary:
        attended, inputs = _with_summary(query, attended, model, inputs)
    logits = _logits(query, attended, scale, model.element)
    # In 16 bits the plugin fuses a plain softmax with both products; float32 is faster by its parts.
    by_parts = model.lse or model.element == ov.Type.f32
    results = _softmax_product_and_lse(logits, attended) if by_parts else [_softmax_product(logits, attended)]
    results[0] = op.convert(results[0], model.element)
    return ov.Model(results[: 1 + model.lse], inputs, "attention rows")


def split_means(kb: np.ndarray, vb: np.ndarray, dtype: np.dtype) -> list[np.ndarray]:
    """Means of keys and values as the graph of `dtype` reads them.

    A sum of two 16-bit numbers is as good as float32 for a logit, where one would be off by as much as 1 in 256.
    """
    if dtype == np.float32:
        return [kb, vb]
    high = kb.astype(dtype)
    wide = high.astype(np.float32)
    rest = np.subtract(kb, wide, out=np.zeros_like(kb), where=np.isfinite(wide))
    return [high, vb.astype(dtype), rest.astype(dtype)]


def _logits(query: ov.Node, attended: _Attended, scale: ov.Node, element: ov.Type) -> ov.Node:
    product = _scaled_product(query, attended.keys, scale, element)
    return product if attended.bias is None else op.add(product, attended.bias)


def _scaled_product(query: ov.Node, keys: ov.Node, scale: ov.Node, element: ov.Type) -> ov.Node:
    if element == ov.Type.f32:
        return op.matmul(op.multiply(query, scale), keys, False, True)
    # a scaled query would be rounded to 16 bits once more
    return op.multiply(op.matmul(query, keys, False, True), scale)


def gathered(table: ov.Node, numbers: ov.Node, head_dim: int) -> ov.Node:
    """Tokens ``[n, tokens, D]`` in float32, from the entries of that number, each of which holds one or more."""
    entries = op.gather(table, numbers, op.constant(np.int64(ENTRIES)))
    # Between the two, the reshape keeps the conversion out of the gather, where it is ten times slower.
    tokens = op.reshape(entries, op.constant(np.array([0, -1, head_dim], np.int64)), special_zero=True)
    # The conversion keeps the logits float32 where the products are 16 bit.
    return op.convert(tokens, ov.Type.f32)


def _with_summary(
    query: ov.Node, kept: _Attended, model: RowModel, inputs: list[ov.Node]
) -> tuple[_Attended, list[ov.Node]]:
    names = ("mean_k", "mean_v") if model.element == ov.Type.f32 else ("mean_k", "mean_v", "rest_of_mean_k")
    means = [op.parameter([-1, model.head_dim], model.element, name) for name in names]
    numbers = op.parameter([-1, -1], ov.Type.i32, "omitted")
    bias = op.parameter([-1, 1, -1], ov.Type.f32, "bias")
    taken = [gathered(mean, numbers, model.head_dim) for mean in means]
    added: ov.Node = bias
    if len(taken) > 2:
        added = op.add(_scaled_product(query, taken[2], inputs[0], model.element), bias)
    keys, values = (
        op.concat([tokens, mean], axis=1) for tokens, mean in zip((kept.keys, kept.values), taken[:2], strict=True)
    )
    tables, rest = inputs[:4], inputs[4:]
    return _Attended(keys, values, _after(kept.keys, added)), [*tables, *means, *rest, numbers, bias]


def _after(tokens: ov.Node, bias: ov.Node) -> ov.Node:
    """A bias of some last columns with zeros in front of it for all tokens."""
    one, two, axis = (op.constant(np.array([value], np.int64)) for value in (1, 2, 0))
    count = op.slice(op.shape_of(tokens), one, two, one, axis)
    front = op.concat([op.constant(np.zeros(2, np.int64)), count], axis=0)
    return op.pad(bias, front, op.constant(np.zeros(3, np.int64)), "constant", op.constant(np.float32(0)))


def _softmax_product(logits: ov.Node, attended: _Attended) -> ov.Node:
    """The form that the CPU plugin fuses into one kernel, whose logits never leave the cache."""
    return op.matmul(op.softmax(logits, -1), attended.values, False, False)


def _softmax_product_and_lse(logits: ov.Node, attended: _Attended) -> list[ov.Node]:
    """The same by its parts, of which the log-sum-exp is made; the division comes last, where rows are short."""
    last, zero, one = (op.constant(value) for value in (np.array([-1], np.int64), np.float32(0), np.float32(1)))
    highest = op.reduce_max(logits, last, True)
    # Where every logit is minus infinity, so is the log-sum-exp, and the output is 0.
    peak = op.select(op.equal(highest, op.constant(np.float32(-np.inf))), zero, highest)
    weights = op.exp(op.subtract(logits, peak))
    total = op.reduce_sum(weights, last, True)
    # No weight exceeds 1, except that this exp makes infinity of NaN.
    lse = op.select(op.is_finite(total), op.add(op.log(total), peak), op.constant(np.float32(np.nan)))
    safe = op.select(op.equal(total, zero), one, total)
    return [op.divide(op.matmul(weights, attended.values, False, False), safe), lse]
