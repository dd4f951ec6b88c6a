"""attend on torch: gather the kept blocks of a few rows at a time, then ordinary attention over them.

Memory stays at the tensors in block order plus one chunk of gathered keys and values, whatever the length. The host
waits for the device only where the kept counts are data (mass budgets, given masks, quotas given at call time);
otherwise the plan knows them. Lengths never make it wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from rainfusion.backends.torch.blocks import beyond, fold, take_tokens, tokens_of
from rainfusion.backends.torch.kept import AttendKept, Folded
from rainfusion.backends.torch.softmax import attend_all, compute_dtype, fused_serves
from rainfusion.backends.torch_arrays import all_modes_off
from rainfusion.core.backend import Device, Kernel, Segment
from rainfusion.core.errors import LoweringError
from rainfusion.core.ops import Attend, AttendMeans, Merge
from rainfusion.core.plan import Plan
from rainfusion.core.stages import Stages

Values = Mapping[str, Tensor]


def build(segment: Segment, plan: Plan, device: Device) -> Callable[[Values], Values]:
    """The kernel of one attention: over all keys, over kept blocks, or over those and the means of the others.

    The last adds `AttendMeans` and `Merge`: merging chunk by chunk spares several passes over whole tensors.

    Raises:
        LoweringError: means or a merge without the attention they belong to, or values between them that are read.
    """
    stages = Stages.of(segment)
    attend, merge = stages.attend, stages.merge
    if attend is None:
        raise LoweringError("means and merges are taken together with the attention over kept blocks")
    if (stages.attend_means is None) != (merge is None):
        raise LoweringError("attention over means is taken together with its merge")
    if merge is None:
        names = (attend.out, attend.lse)
    else:
        names = (merge.out, merge.lse)
        between = [name for name in segment.outputs if name not in names]
        if between:
            raise LoweringError(f"{', '.join(between)} would have to leave the kernel before the merge")
    wants_lse = names[1] is not None and segment.wants(names[1])
    place = torch.device(str(device))
    with all_modes_off():
        if attend.mask is None:
            return _Dense(attend, names, plan, place, wants_lse=wants_lse)
        return _Sparse(attend, stages.attend_means, names, plan, place, wants_lse=wants_lse)


KERNEL = Kernel(frozenset({Attend, AttendMeans, Merge}), build)


class _Attention:
    """What both kinds share: which values they read and make, and where results are written.

    The output is made in the dtype of q; in float32 (float64 for float64) where the log-sum-exp is wanted too, or
    where another operation reads the output.
    """

    def __init__(
        self,
        attend: Attend,
        names: tuple[str, str | None],
        plan: Plan,
        device: torch.device,
        *,
        wants_lse: bool,
    ) -> None:
        self._attend, self._names, self._wants_lse = attend, names, wants_lse
        dtype = getattr(torch, plan.types[attend.q].dtype)
        self._compute_dtype = compute_dtype(dtype)
        wide = wants_lse or any(names[0] in op.reads for op in plan.ops)
        self._out_dtype = self._compute_dtype if wide else dtype
        self._is_fused = fused_serves(dtype, device, needs_lse=wants_lse, returns_lse=wants_lse)

    def _results(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the output is written and, where it is wanted, the log-sum-exp."""
        out = torch.empty(q.shape, dtype=self._out_dtype, device=q.device)
        return out, torch.empty(q.shape[:-1], dtype=self._compute_dtype, device=q.device) if self._wants_lse else None

    def _named(self, out: Tensor, lse: Tensor | None) -> Values:
        name, lse_name = self._names
        return {name: out} if lse is None or lse_name is None else {name: out, lse_name: lse}

    def _read(self, values: Values, operand: str) -> Tensor | None:
        """An operand of `Attend`; None where it has none."""
        name = getattr(self._attend, operand)
        return None if name is None else values[name]


class _Dense(_Attention):
    """Every query over every key. The order matters to lengths only, which count in it."""

    @property
    def how(self) -> str:
        """For ``print(executable)``."""
        return "all keys, " + ("torch's fused attention" if self._is_fused else "two products")

    def __call__(self, values: Values) -> Values:
        q, k, v = (values[name] for name in (self._attend.q, self._attend.k, self._attend.v))
        out, lse = self._results(q)
        lengths, hidden = self._read(values, "lengths"), None
        if lengths is not None:
            hidden = _as_tokens(beyond(lengths, k.shape[2]), self._read(values, "kv_order"))
            k, v = (x.masked_fill(hidden[:, None, :, None], 0) for x in (k, v))  # NaN there must not spread
        attend_all(q, k, v, out, lse, hidden, self._attend.scale, is_fused=self._is_fused)
        if lengths is not None and self._attend.lengths_on_queries:
            _empty(out, lse, _as_tokens(beyond(lengths, q.shape[2]), self._read(values, "order")))
        return self._named(out, lse)


class _Sparse(_Attention):
    """Every query block over the key blocks that the mask keeps."""

    def __init__(
        self,
        attend: Attend,
        means: AttendMeans | None,
        names: tuple[str, str | None],
        plan: Plan,
        device: torch.device,
        *,
        wants_lse: bool,
    ) -> None:
        q_len, kv_len = (plan.types[name].shape[2] for name in (attend.q, attend.k))
        block = min(attend.block[0], q_len), min(attend.block[1], kv_len)
        attend = replace(attend, block=block)  # memory is that of the tokens, whatever a plan says
        super().__init__(attend, names, plan, device, wants_lse=wants_lse)
        self._means = () if means is None else (means.kb, means.vb)
        needs_lse = wants_lse or means is not None
        is_fused = fused_serves(
            getattr(torch, plan.types[attend.q].dtype), device, needs_lse=needs_lse, returns_lse=wants_lse
        )
        self._kept = AttendKept(attend, plan, device, is_fused=is_fused, needs_lse=needs_lse)

    @property
    def how(self) -> str:
        """For ``print(executable)``."""
        return self._kept.how

    def __call__(self, values: Values) -> Values:
        attend = self._attend
        q, k = values[attend.q], values[attend.k]
        folded, hidden = self._folded(values)
        out, lse = self._results(folded.queries)
        dense_from = attend.block[0] * self._kept(folded, out, lse)

        queries, out = (tokens_of(x, *q.shape[:3]) for x in (folded.queries, out))
        lse = None if lse is None else tokens_of(lse, *q.shape[:3])
        keys, values_ = (tokens_of(x, *k.shape[:3]) for x in (folded.keys, folded.values))
        q_rest, out_rest = queries[:, :, dense_from:], out[:, :, dense_from:]
        lse_rest = None if lse is None else lse[:, :, dense_from:]
        attend_all(q_rest, keys, values_, out_rest, lse_rest, hidden, attend.scale, is_fused=self._is_fused)
        if folded.lengths is not None and attend.lengths_on_queries:
            _empty(out, lse, beyond(folded.lengths, q.shape[2]))
        inverse = self._read(values, "inverse")
        return self._named(take_tokens(out, inverse), None if lse is None else take_tokens(lse, inverse))

    def _folded(self, values: Values) -> tuple[Folded, Tensor | None]:
        """The tensors in blocks, and the keys beyond their sample's length, bool ``[B, keys]`` in block order."""
        attend, lengths = self._attend, self._read(values, "lengths")
        hidden = None if lengths is None else beyond(lengths, values[attend.k].shape[2])
        kv_order = self._read(values, "kv_order")
        queries = fold(values[attend.q], self._read(values, "order"), attend.block[0])
        keys, tokens = (fold(values[name], kv_order, attend.block[1], hidden) for name in (attend.k, attend.v))
        kb, vb = (fold(values[name], None, 1) for name in self._means) if self._means else (None, None)
        means = None if kb is None or vb is None else (kb, vb)
        mask = values[attend.mask]  # type: ignore[index]  # built for a mask only
        return Folded(queries, keys, tokens, means, mask, lengths), hidden


def _as_tokens(by_position: Tensor, order: Tensor | None) -> Tensor:
    """``[B, positions]`` of the block order as ``[B, tokens]``."""
    return by_position if order is None else torch.empty_like(by_position).index_copy_(1, order, by_position)


def _empty(out: Tensor, lse: Tensor | None, rows: Tensor) -> None:
    """Write 0 and minus infinity where bool ``[B, tokens]`` says so."""
    out.masked_fill_(rows[:, None, :, None], 0)
    if lse is not None:
        lse.masked_fill_(rows[:, None], -inf)
