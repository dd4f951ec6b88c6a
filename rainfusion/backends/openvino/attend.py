"""Kernels for `attend`, and for the `attend, attend, merge` of ``omitted="summary"``, which is one attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from rainfusion.backends.interop import numpy_dtype
from rainfusion.backends.openvino.copies import converted, in_block_order, reorder
from rainfusion.backends.openvino.memory import POOL
from rainfusion.backends.openvino.row_model import RowModel, row_requests
from rainfusion.backends.openvino.runtime import Arrays, computes_in
from rainfusion.backends.openvino.schedule import Batch, batches, cuts
from rainfusion.backends.openvino.tensors import ELEMENTS, BlockRows, Rows, Side, longest_run, rows_of
from rainfusion.core.backend import Device, Segment
from rainfusion.core.ir import Plan

ATTEND = ("attend",)
ATTEND_WITH_SUMMARY = ("attend", "attend", "merge")

# Fewer, larger requests save hand-outs, until what they gather is long out of the second-level cache (1 or 2 MiB a core
# where this was tuned); the logits of rows that share their keys may not make up the memory of a call.
_GATHERED_BYTES = 2**22
_LOGITS = 2**21
_NUMBERED = 32  # requests whose row numbers are made at a time
# With so few kept pairs for a block, keys and values need no copy in block order where it has runs of so many bytes.
_READS, _RUN_BYTES = 8, 2**11


def build_attend(segment: Segment, plan: Plan, device: Device) -> Callable[..., tuple[np.ndarray, ...]]:
    """The kernel: from the arrays named by ``segment.inputs`` to ``(out,)`` or ``(out, lse)``."""
    attend = Attend(segment, plan, device)

    def run(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        values = dict(zip(segment.inputs, arrays, strict=True))
        means = (values["%kb"], values["%vb"]) if attend.summary else ()
        return attend(values["%q"], values["%k"], values["%v"], values.get("%mask"), means)

    return run


class Attend:
    """One attention of a plan on a device, a few rows of the block mask a request."""

    def __init__(self, segment: Segment, plan: Plan, device: Device) -> None:
        self.plan, self.device = plan, device
        self.lse, self.summary = len(segment.outputs) == 2, len(segment.ops) > 1
        # The log-sum-exp is float32 whatever the tensors are, so what it is made of must be too.
        self.dtype = "float32" if self.lse else computes_in(plan.problem.dtype, device)
        self.orders = [plan.layout.order if arg else None for arg in segment.ops[0].args[3:5]]
        self.run = longest_run(plan.kv_axis, self.orders[1])
        model = RowModel(plan.problem.head_dim, ELEMENTS[numpy_dtype(self.dtype)], self.lse, self.summary)
        self.requests = row_requests(model, device)

    def __call__(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        mask: np.ndarray | None,
        means: tuple[np.ndarray, ...],
    ) -> tuple[np.ndarray, ...]:
        """Attend.

        Args:
            q: ``[B, H, q_len, D]``; k, v: ``[B, H or fewer, kv_len, D]``.
            mask: bool ``[B, H, q blocks, key blocks]``; None attends to all.
            means: of the keys and values of every block, float32 ``[B, H or fewer, key blocks, D]``, for
                those that `mask` skips; empty where they are dropped.

        Returns:
            ``(out,)`` or ``(out, lse)``: ``[B, H, q_len, D]`` in the dtype of the products, float32 ``[B, H, q_len]``.
        """
        p, q_blocks, kv_blocks = self.plan.problem, self.plan.q_axis.blocks, self.plan.kv_axis.blocks
        if mask is None:
            mask = np.ones((p.batch, p.heads, q_blocks, kv_blocks), dtype=bool)
        reads = np.count_nonzero(mask) / (p.batch * p.kv_heads * kv_blocks)
        sides = [Side(self._table(q), self.orders[0]), *self._gathered(k, v, reads)]
        summaries = [rows_of(x) for x in means]
        scale = np.full((1, 1, 1), p.scale, np.float32)
        work = self._batches(mask)
        staged = _Staged(self.plan, self.orders[0], work, numpy_dtype(self.dtype))
        common = [scale, *(side.rows.table for side in sides), *(rows.table for rows in summaries)]
        inputs = _Inputs(self.plan, sides, summaries)
        self.requests.run(common, _requests(work, inputs, staged.parts(self.lse)))
        return staged.restored(self.device, self.lse)

    def _table(self, x: np.ndarray) -> Rows:
        """A tensor's tokens in the dtype of the products."""
        return rows_of(converted(x, numpy_dtype(self.dtype), self.device))

    def _gathered(self, k: np.ndarray, v: np.ndarray, reads: float) -> list[Side]:
        """Keys and values as they are gathered, by the same row numbers: in place, or from a copy in block order.

        Args:
            k, v: ``[B, H or fewer, kv_len, D]``.
            reads: kept block pairs, for every block of keys.
        """
        order, tables = self.orders[1], [self._table(x) for x in (k, v)]
        keys, values = (table.in_runs(self.run) for table in tables)
        seldom = reads <= _READS and keys.table[:1].nbytes >= _RUN_BYTES
        if keys[1:] == values[1:] and (order is None or seldom):
            return [Side(keys, order), Side(values, order)]
        del keys, values  # each table is let go as soon as it is copied
        return [self._in_block_order(tables.pop(0)) for _ in range(2)]

    def _in_block_order(self, rows: Rows) -> Side:
        p, kv, order = self.plan.problem, self.plan.kv_axis, self.orders[1]
        tokens = np.arange(kv.length) if order is None else order
        ordered = in_block_order(rows, tokens, p.batch, p.kv_heads, self.device)
        return Side(ordered.in_runs(longest_run(kv, None)), None)

    def _batches(self, mask: np.ndarray) -> list[Batch]:
        keys = _GATHERED_BYTES // (2 * self.plan.problem.head_dim * numpy_dtype(self.dtype).itemsize)
        return batches(mask, self.plan.q_axis, self.plan.kv_axis, keys=keys, logits=_LOGITS, summary=self.summary)


def _requests(work: list[Batch], inputs: _Inputs, outputs: Iterator[Arrays]) -> Iterator[tuple[Arrays, Arrays]]:
    """The inputs and outputs of every request."""
    for batch, written in zip(work, outputs, strict=True):
        for numbered in cuts(len(batch.heads), batch.at_once * _NUMBERED):
            read, write = inputs(batch.part(numbered)), [x[numbered] for x in written]
            for rows in cuts(len(read[0]), batch.at_once):
                yield [x[rows] for x in read], [x[rows] for x in write]


class _Inputs:
    """Makes the inputs of a batch: row numbers, and for summaries the logit bias."""

    def __init__(self, plan: Plan, sides: list[Side], means: list[Rows]) -> None:
        p, kv = plan.problem, plan.kv_axis
        q, keys, values = sides
        assert keys.rows[1:] == values.rows[1:]
        self._query = BlockRows(q, plan.q_axis, q.rows.base(p.batch, p.heads))
        self._keys = BlockRows(keys, kv, keys.rows.base(p.batch, p.heads, p.group))
        self._run = keys.rows.run
        self._mean_base = means[0].base(p.batch, p.heads, p.group) if means else None
        self._log_counts = np.log(kv.counts).astype(np.float32)

    def __call__(self, batch: Batch) -> Arrays:
        rows = [self._query(batch.heads, batch.query), self._keys(batch.heads, batch.kept)]
        return rows if self._mean_base is None else [*rows, *self._summary(batch, rows[1])]

    def _summary(self, batch: Batch, keys: np.ndarray) -> Arrays:
        assert self._mean_base is not None
        tokens = (len(keys), keys.shape[1] * self._run)
        bias = np.concatenate([np.zeros(tokens, np.float32), self._log_counts[batch.skipped]], axis=1)
        return [(self._mean_base[batch.heads, None] + batch.skipped).astype(np.int32), bias[:, None, :]]


class _Staged:
    """Where requests write, batch after batch, and the way from there back to the caller's token order."""

    def __init__(self, plan: Plan, order: np.ndarray | None, work: list[Batch], dtype: np.dtype) -> None:
        p = plan.problem
        self._plan = plan
        tokens = Rows(np.empty((0, 0)), (p.heads * p.q_len, p.q_len, 1))
        token_rows = BlockRows(Side(tokens, order), plan.q_axis, tokens.base(p.batch, p.heads))
        self._taken = [token_rows(batch.heads, batch.query) for batch in work]
        self._starts = np.cumsum([0, *(rows.size for rows in self._taken)])
        # One row more than is written, for queries that keep nothing: output 0, log-sum-exp minus infinity.
        self._out = POOL.array((int(self._starts[-1]) + 1, p.head_dim), dtype)
        self._lse = np.empty(self._starts[-1] + 1, np.float32)
        self._out[-1], self._lse[-1] = 0, -np.inf

    def parts(self, lse: bool) -> Iterator[Arrays]:
        """The arrays that receive the outputs of each batch."""
        for rows, end in zip(self._taken, self._starts[1:], strict=True):
            span = slice(end - rows.size, end)
            out = self._out[span].reshape(*rows.shape, -1)
            yield [out, self._lse[span].reshape(*rows.shape, 1)] if lse else [out]

    def restored(self, device: Device, lse: bool) -> tuple[np.ndarray, ...]:
        """``[B, H, q_len, D]`` laid out as the caller's tensors are, and the log-sum-exp where it is wanted."""
        p = self._plan.problem
        place = np.full(p.batch * p.heads * p.q_len, self._starts[-1], np.int32)
        if self._taken:
            place[np.concatenate([rows.ravel() for rows in self._taken])] = np.arange(self._starts[-1], dtype=np.int32)
        shape = (p.batch, p.heads, p.q_len)
        swap = (0, 2, 1) if p.tensor_layout == "bshd" else (0, 1, 2)
        out = POOL.array(p.q_shape, self._out.dtype)
        numbers = np.ascontiguousarray(place.reshape(shape).transpose(swap)).ravel()
        reorder(self._out, numbers, out.reshape(-1, p.head_dim), device)
        swapped = out.transpose(*swap, 3)
        return (swapped, self._lse[place].reshape(shape)) if lse else (swapped,)
