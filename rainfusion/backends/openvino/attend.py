"""Kernels for `attend`, and for the `attend, attend, merge` of ``omitted="summary"``, which is one attention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rainfusion.backends.interop import numpy_dtype
from rainfusion.backends.openvino.memory import POOL
from rainfusion.backends.openvino.order import in_block_order, reorder
from rainfusion.backends.openvino.row_model import RowModel, row_requests
from rainfusion.backends.openvino.runtime import Arrays, computes_in
from rainfusion.backends.openvino.schedule import Piece, pieces
from rainfusion.backends.openvino.tensors import ELEMENTS, BlockRows, Rows, rows_of
from rainfusion.core.backend import Device, Segment
from rainfusion.core.ir import Plan

ATTEND = ("attend",)
ATTEND_WITH_SUMMARY = ("attend", "attend", "merge")

# Fewer, larger requests save hand-outs, until what they gather is long out of the second-level cache (1 or 2 MiB a core
# where this was tuned); the logits of rows that share their keys may not make up the memory of a call.
_GATHERED_BYTES = 2**22
_LOGITS = 2**21


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
        model = RowModel(plan.problem.head_dim, ELEMENTS[self.dtype], self.lse, self.summary)
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
        tables = [self._table(q), self._in_runs(self._table(k)), self._in_runs(self._table(v))]
        summaries = [rows_of(x) for x in means]
        scale = np.full((1, 1, 1), self.plan.problem.scale, np.float32)
        work = self._pieces(mask)
        staged = _Staged(self.plan, self.orders[0], work, numpy_dtype(self.dtype))
        common = [scale, *(rows.table for rows in (*tables, *summaries))]
        inputs = _Inputs(self.plan, self.orders[0], tables, summaries)
        self.requests.run(common, ((inputs(piece), staged.parts(at, self.lse)) for at, piece in enumerate(work)))
        return staged.restored(self.device, self.lse)

    def _table(self, x: np.ndarray) -> Rows:
        """A tensor's tokens in the dtype of the products."""
        return rows_of(x.astype(numpy_dtype(self.dtype), copy=False))

    def _in_runs(self, rows: Rows) -> Rows:
        """Keys or values in block order, in rows as long as they go."""
        p, order = self.plan.problem, self.orders[1]
        ordered = rows if order is None else in_block_order(rows, order, p.batch, p.kv_heads, self.device)
        return ordered.in_runs(self.plan.kv_axis)

    def _pieces(self, mask: np.ndarray | None) -> list[Piece]:
        p, q, kv = self.plan.problem, self.plan.q_axis, self.plan.kv_axis
        if mask is None:
            mask = np.ones((p.batch, p.heads, q.blocks, kv.blocks), dtype=bool)
        keys = _GATHERED_BYTES // (2 * p.head_dim * numpy_dtype(self.dtype).itemsize)
        return pieces(mask, q, kv, keys=keys, logits=_LOGITS, summary=self.summary)


class _Inputs:
    """Makes the inputs of a request from a piece: row numbers, and for summaries the logit bias."""

    def __init__(self, plan: Plan, q_order: np.ndarray | None, tables: list[Rows], means: list[Rows]) -> None:
        p, kv = plan.problem, plan.kv_axis
        self._query = BlockRows(tables[0], plan.q_axis, q_order, tables[0].base(p.batch, p.heads))
        self._keys, self._values = (BlockRows(x, kv, None, x.base(p.batch, p.heads, p.group)) for x in tables[1:])
        self._same_rows = tables[1][1:] == tables[2][1:]
        self._run = tables[1].run
        self._mean_base = means[0].base(p.batch, p.heads, p.group) if means else None
        self._log_counts = np.log(kv.counts).astype(np.float32)

    def __call__(self, piece: Piece) -> Arrays:
        keys = self._keys(piece.heads, piece.kept)
        values = keys if self._same_rows else self._values(piece.heads, piece.kept)
        rows = [self._query(piece.heads, piece.query), keys, values]
        return rows if self._mean_base is None else [*rows, *self._summary(piece, keys)]

    def _summary(self, piece: Piece, keys: np.ndarray) -> Arrays:
        assert self._mean_base is not None
        tokens = (len(keys), keys.shape[1] * self._run)
        bias = np.concatenate([np.zeros(tokens, np.float32), self._log_counts[piece.skipped]], axis=1)
        return [(self._mean_base[piece.heads, None] + piece.skipped).astype(np.int32), bias[:, None, :]]


class _Staged:
    """Where requests write, piece after piece, and the way from there back to the caller's token order."""

    def __init__(self, plan: Plan, order: np.ndarray | None, work: list[Piece], dtype: np.dtype) -> None:
        p = plan.problem
        self._plan = plan
        tokens = Rows(np.empty((0, 0)), (p.heads * p.q_len, p.q_len, 1))
        token_rows = BlockRows(tokens, plan.q_axis, order, tokens.base(p.batch, p.heads))
        self._taken = [token_rows(piece.heads, piece.query) for piece in work]
        self._starts = np.cumsum([0, *(rows.size for rows in self._taken)])
        # One row more than is written, for queries that keep nothing: output 0, log-sum-exp minus infinity.
        self._out = POOL.array((int(self._starts[-1]) + 1, p.head_dim), dtype)
        self._lse = np.empty(self._starts[-1] + 1, np.float32)
        self._out[-1], self._lse[-1] = 0, -np.inf

    def parts(self, at: int, lse: bool) -> Arrays:
        """The arrays that receive the outputs of piece `at`."""
        shape, span = self._taken[at].shape, slice(self._starts[at], self._starts[at + 1])
        out = self._out[span].reshape(*shape, -1)
        return [out, self._lse[span].reshape(*shape, 1)] if lse else [out]

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
