"""The kernel for `attend`, and for `attend`, `attend_means` and `merge`, which together are one attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from rainfusion.backends.host_arrays import numpy_dtype
from rainfusion.backends.openvino.constants import constant_order, require
from rainfusion.backends.openvino.copies import converted, in_block_order
from rainfusion.backends.openvino.lengths import common_run, counted
from rainfusion.backends.openvino.memory import new_plan
from rainfusion.backends.openvino.outputs import Staged
from rainfusion.backends.openvino.row_model import RowModel, row_requests, split_means
from rainfusion.backends.openvino.runtime import Arrays, computes_in
from rainfusion.backends.openvino.schedule import Batch, batches, cuts
from rainfusion.backends.openvino.tensors import ELEMENTS, BlockNumbers, Side, TokenTable, longest_run, token_table
from rainfusion.core.backend import Device, Kernel, Run, Segment
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.ops import Attend, AttendMeans, Merge
from rainfusion.core.plan import Plan
from rainfusion.core.stages import Stages

# Fewer, larger requests save hand-outs, until what they gather is long out of the second-level cache (1 or 2 MiB a core
# where this was tuned); the logits of rows that share their keys may not make up the memory of a call.
_GATHERED_BYTES = 2**22
_LOGITS = 2**21
_NUMBERED = 32  # requests whose numbers are made at a time
# With so few kept pairs for a block, keys and values need no copy in block order where it has runs of so many bytes.
_READS, _RUN_BYTES = 8, 2**11


def build_attention(segment: Segment, plan: Plan, device: Device) -> Run:
    """The kernel: from q, k, v (and the mask, the lengths, the means of keys and values) to the output.

    Raises:
        LoweringError: not one attention over tokens, values between its operations that are read elsewhere, or an
            order that is known only at call time.
    """
    stages = Stages.of(segment)
    require(stages.attend is not None, "means are attended together with tokens only")
    results = {stages.out, stages.lse}
    require(results.issuperset(segment.outputs), "a part of the attention is read elsewhere")
    attention = _Attention(stages, segment, plan, device)

    def run(values: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        made = zip((stages.out, stages.lse), attention(values), strict=False)
        return {name: value for name, value in made if name is not None}

    return run


ATTENTION = Kernel(frozenset({Attend, AttendMeans, Merge}), build_attention)


class _Attention:
    """One attention of a plan on a device, a few rows of the block mask a request."""

    def __init__(self, stages: Stages, segment: Segment, plan: Plan, device: Device) -> None:
        assert stages.attend is not None
        self.op, self.means, self.device = stages.attend, stages.attend_means, device
        q, k = plan.types[self.op.q], plan.types[self.op.k]
        require(q.dtype in ("float32", "float16", "bfloat16"), f"no products of {q.dtype}")
        self.shape, self.kv_heads = q.shape, k.shape[1]
        self.q, self.kv = (
            BlockedAxis(x.shape[2], min(block, x.shape[2]), False, x.shape[2])
            for x, block in zip((q, k), self.op.block, strict=True)
        )
        self.order = constant_order(plan, self.op.order, self.op.inverse)
        self.kv_order = constant_order(plan, self.op.kv_order)
        self.run = longest_run(self.kv, self.kv_order)
        self.swapped = plan.problem.tensor_layout == "bshd"
        lse = segment.wants(stages.lse)
        # The log-sum-exp is float32 whatever the tensors are, so what it is made of must be too; and so is what other
        # operations read.
        read_on = any(stages.out in op.reads for op in plan.ops)
        self.dtype = numpy_dtype("float32" if lse or read_on else computes_in(q.dtype, device))
        self.model = RowModel(q.shape[3], ELEMENTS[self.dtype], lse, self.means is not None)
        row_requests(self.model, device)  # compiled before the first call
        new_plan()

    def __call__(self, values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Attend.

        Args:
            values: what the operations read, by name.

        Returns:
            ``[out]`` or ``[out, lse]``: ``[B, H, q_len, D]`` in the dtype of the products, float32 ``[B, H, q_len]``.
        """
        op = self.op
        grid = (*self.shape[:2], self.q.blocks, self.kv.blocks)
        mask = np.ones(grid, bool) if op.mask is None else values[op.mask]
        lengths = None if op.lengths is None else values[op.lengths]
        q_counts = counted(self.q, lengths if op.lengths_on_queries else None)
        kv_counts = counted(self.kv, lengths)
        work = self._batches(mask, q_counts, kv_counts)
        keys, key_values = self._gathered(values[op.k], values[op.v], int(np.count_nonzero(mask)), kv_counts)
        query = Side(self._table(values[op.q]), self.order)
        means = self._means(values)
        inputs = _Inputs(self, query, keys, means, kv_counts)
        staged = Staged(self.shape, self.q, self.order, work, self.dtype)
        scale = np.full((1, 1, 1), op.scale, np.float32)
        split = split_means(means[0], means[1], self.dtype) if means else []
        tables = [side.tokens.memory for side in (query, keys, key_values)]
        common = [scale, *tables, *(token_table(x).memory for x in split)]
        parts = staged.parts(self.model.lse)
        row_requests(self.model, self.device).run(common, _requests(work, inputs, parts))
        return staged.restored(self.device, self.swapped, self.model.lse)

    def _means(self, values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The means of keys and values, laid out alike; none where omitted blocks do not count."""
        names = () if self.means is None else (self.means.kb, self.means.vb)
        return [np.ascontiguousarray(values[name]) for name in names]

    def _table(self, x: np.ndarray) -> TokenTable:
        """A tensor's tokens in the dtype of the products."""
        return token_table(converted(x, self.dtype, self.device))

    def _gathered(self, k: np.ndarray, v: np.ndarray, kept: int, counts: np.ndarray) -> list[Side]:
        """Keys and values as they are gathered, by the same numbers: in place, or from a copy in block order.

        Args:
            k, v: ``[B, H or fewer, kv_len, D]``.
            kept: block pairs; counts: tokens of every key block that take part.
        """
        tables = [self._table(x) for x in (k, v)]
        run = common_run(self.run, counts)
        keys, values = (table.in_runs(run) for table in tables)
        reads = kept / (self.shape[0] * self.kv_heads * self.kv.blocks)
        seldom = reads <= _READS and keys.memory[:1].nbytes >= _RUN_BYTES
        if keys[1:] == values[1:] and (self.kv_order is None or seldom):
            return [Side(keys, self.kv_order), Side(values, self.kv_order)]
        del keys, values  # each table is let go as soon as it is copied
        run = common_run(longest_run(self.kv, None), counts)
        return [self._in_block_order(tables.pop(0), run) for _ in range(2)]

    def _in_block_order(self, table: TokenTable, run: int) -> Side:
        tokens = np.arange(self.kv.length) if self.kv_order is None else self.kv_order
        ordered = in_block_order(table, tokens, self.shape[0], self.kv_heads, self.device)
        return Side(ordered.in_runs(run), None)

    def _batches(self, mask: np.ndarray, q_counts: np.ndarray, kv_counts: np.ndarray) -> list[Batch]:
        keys = _GATHERED_BYTES // (2 * self.shape[3] * self.dtype.itemsize)
        return batches(mask, q_counts, kv_counts, keys=keys, logits=_LOGITS, summary=self.model.summary)


def _requests(work: list[Batch], inputs: _Inputs, outputs: Iterator[Arrays]) -> Iterator[tuple[Arrays, Arrays]]:
    """The inputs and outputs of every request."""
    for batch, written in zip(work, outputs, strict=True):
        for numbered in cuts(len(batch.heads), batch.at_once * _NUMBERED):
            read, write = inputs(batch.part(numbered)), [x[numbered] for x in written]
            for rows in cuts(len(read[0]), batch.at_once):
                yield [x[rows] for x in read], [x[rows] for x in write]


class _Inputs:
    """Makes the inputs of a batch: numbers of tokens, and for summaries those of means and their logit bias."""

    def __init__(
        self, attention: _Attention, query: Side, keys: Side, means: list[np.ndarray], kv_counts: np.ndarray
    ) -> None:
        batch, heads = attention.shape[:2]
        group = heads // attention.kv_heads
        self._query = BlockNumbers(query, attention.q, query.tokens.base(batch, heads))
        self._keys = BlockNumbers(keys, attention.kv, keys.tokens.base(batch, heads, group))
        self._means = None if not means else token_table(means[0]).base(batch, heads, group)
        if means:
            with np.errstate(divide="ignore"):  # of a block without tokens, which no row reads
                log_counts = np.log(kv_counts).astype(np.float32)
            self._log_counts = np.broadcast_to(log_counts, (batch, log_counts.shape[1]))
            self._heads = heads

    def __call__(self, batch: Batch) -> Arrays:
        tokens = [
            self._query(batch.heads, batch.query, batch.q_tokens),
            self._keys(batch.heads, batch.kept, batch.kv_tokens),
        ]
        if self._means is None:
            return tokens
        numbers = (self._means[batch.heads, None] + batch.omitted).astype(np.int32)
        bias = self._log_counts[batch.heads[:, None] // self._heads, batch.omitted]
        return [*tokens, numbers, bias[:, None, :]]
