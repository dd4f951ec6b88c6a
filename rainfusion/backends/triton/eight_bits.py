"""Which operations of a segment round what Hopper's kernel attends in 8 bits, and the passes that do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rainfusion.backends.triton.operands import Quantised, QuantisedMeans
from rainfusion.backends.triton.quantise_blocks import ROWS, Rounded, quantise_blocks, statistics
from rainfusion.core.backend import Segment
from rainfusion.core.errors import LoweringError
from rainfusion.core.ops import AttendMeansQuantised, AttendQuantised, BlockMean, Quantise
from rainfusion.core.stages import Stages

_DTYPES = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class EightBits:
    """The rounding of one attention.

    Attributes:
        q, k, v, kb, vb: what makes its operands; the last two where it attends the means of omitted blocks.
        means: the block means that the passes over q, k and v make on the way, by operand.
        wants_lse: whether the log-sum-exp is read.
    """

    q: Quantise
    k: Quantise
    v: Quantise
    kb: Quantise | None
    vb: Quantise | None
    means: Mapping[str, BlockMean]
    wants_lse: bool

    @classmethod
    def of(cls, stages: Stages, segment: Segment, *, wants_lse: bool) -> EightBits | None:
        """The rounding of a segment; None where it attends in 16 bits.

        Raises:
            LoweringError: operands that are rounded in another way than the kernel reads them.
        """
        attend, rest = stages.attend, stages.attend_means
        if not isinstance(attend, AttendQuantised):
            if stages.quantised:
                raise LoweringError("tensors are rounded in the same kernel that attends them")
            return None
        q, k, v = (_rounding(stages, name) for name in (attend.q, attend.k, attend.v))
        kb = vb = None
        if rest is not None:
            kb, vb = _rounding(stages, rest.kb), _rounding(stages, rest.vb)
        found = cls(q, k, v, kb, vb, _means_on_the_way(stages, q, k, v), wants_lse)
        found._check(attend, segment)
        if kb is not None and vb is not None:
            found._check_means(kb, vb, stages)
        if len(stages.quantised) != len(found._all):
            raise LoweringError("a tensor is rounded that is not attended")
        return found

    @property
    def _all(self) -> tuple[Quantise, ...]:
        return tuple(op for op in (self.q, self.k, self.v, self.kb, self.vb) if op is not None)

    def _check(self, attend: AttendQuantised, segment: Segment) -> None:
        q, k, v = self.q, self.k, self.v
        q_lengths = (attend.lengths, None) if attend.lengths_on_queries else (None,)
        outside = [name for op in self._all for name in op.makes if segment.wants(name)]
        _need(not outside, f"{''.join(outside[:1])} is read outside, and the kernel never writes it")
        _need(q.block == k.block == ROWS and attend.block == (ROWS, ROWS), f"scales of other blocks than {ROWS} tokens")
        _need(q.format == k.format and q.rotated == k.rotated, "queries and keys are rounded differently")
        _need(v.format == "e4m3" and v.by_channel and not v.rotated, "values are not in e4m3 with a scale a channel")
        _need((q.order, q.lengths in q_lengths) == (attend.order, True), "queries are rounded in other blocks")
        for op in (k, v):
            _need((op.order, op.lengths) == (attend.kv_order, attend.lengths), "keys are rounded in other blocks")
            _need(op.centred and op.tokens == 1, "keys and values are not rounded around their mean")
        _need(not q.centred and q.tokens == 1, "queries are rounded around their mean")
        _need(attend.centre is not None and attend.centre == v.y_centre, "attention is around another centre")
        given = [name for op in (q, k, v) for name in (op.centre, op.scale) if name is not None]
        _need(not given, f"{''.join(given[:1])} comes from elsewhere")

    def _check_means(self, kb: Quantise, vb: Quantise, stages: Stages) -> None:
        k, v, rest = self.k, self.v, stages.attend_means
        assert isinstance(rest, AttendMeansQuantised)
        _need(
            (kb.format, kb.block, kb.rotated) == (k.format, k.block, k.rotated), "means of keys are rounded differently"
        )
        _need(vb.by_channel and vb.format == v.format and not vb.rotated, "means of values are rounded differently")
        _need(
            kb.centre is not None and kb.centre == k.y_centre and kb.scale is None,
            "means of keys around another centre",
        )
        same = (vb.centre, vb.scale) == (v.y_centre, v.y_scale) and vb.centre is not None and vb.scale is not None
        _need(same and vb.centre == rest.centre, "means of values around another centre")
        for op in (kb, vb):
            _need(
                op.order is None and (op.tokens, op.lengths) == (ROWS, rest.lengths),
                "means are rounded in another order",
            )

    def __call__(
        self, values: Values, ordered: Callable[[str | None], Tensor | None], means: dict[str, Tensor]
    ) -> Quantised:
        """Round q, k and v, and the means that are attended.

        Args:
            ordered: an order by the name of its value.
            means: block means by name; takes those that are made on the way.
        """
        lengths = None if self.k.lengths is None else values[self.k.lengths]
        q_lengths = None if self.q.lengths is None else values[self.q.lengths]
        dtype = _DTYPES[self.k.format]
        key, value = values[self.k.x], values[self.v.x]
        order = ordered(self.k.order)
        k_centre, _ = statistics(key, order, lengths, spread=False)
        v_centre, v_scale = statistics(value, order, lengths, spread=True)
        q = quantise_blocks(
            values[self.q.x],
            ordered(self.q.order),
            q_lengths,
            dtype,
            rotate=self.q.rotated,
            mean="q" in self.means,
            shift_by=k_centre if self.wants_lse else None,
        )
        k = _keys(key, order, lengths, dtype, k_centre, rotate=self.k.rotated, mean="k" in self.means)
        v = _values(value, order, lengths, v_centre, v_scale, mean="v" in self.means)
        by_operand = {"q": q, "k": k, "v": v}
        means.update({op.mean: _given(by_operand[operand].mean) for operand, op in self.means.items()})
        rounded = None
        if self.kb is not None and self.vb is not None:
            counted = None if lengths is None else (lengths + (ROWS - 1)) // ROWS  # blocks with a valid token
            kb, vb = (means[op.x] if op.x in means else values[op.x] for op in (self.kb, self.vb))
            rounded_kb = _keys(kb, None, counted, dtype, k_centre, rotate=self.k.rotated)
            rounded_vb = _values(vb, None, counted, v_centre, v_scale)
            rounded = QuantisedMeans(rounded_kb.x, _given(rounded_kb.scale), rounded_vb.x)
        return Quantised(q.x, _given(q.scale), k.x, _given(k.scale), v.x, _given(v_scale), v_centre, q.shift, rounded)


def _keys(
    x: Tensor,
    order: Tensor | None,
    lengths: Tensor | None,
    dtype: torch.dtype,
    centre: Tensor,
    *,
    rotate: bool,
    mean: bool = False,
) -> Rounded:
    return quantise_blocks(x, order, lengths, dtype, centre=centre, rotate=rotate, repeat_scale=True, mean=mean)


def _values(
    x: Tensor, order: Tensor | None, lengths: Tensor | None, centre: Tensor, scale: Tensor | None, mean: bool = False
) -> Rounded:
    return quantise_blocks(
        x, order, lengths, torch.float8_e4m3fn, centre=centre, channel_scale=scale, transpose=True, mean=mean
    )


def _means_on_the_way(stages: Stages, q: Quantise, k: Quantise, v: Quantise) -> dict[str, BlockMean]:
    """The block means that are of the tokens that an operand is rounded from, in the same blocks."""
    found: dict[str, BlockMean] = {}
    for operand, op in (("q", q), ("k", k), ("v", v)):
        wanted = (op.x, op.order, op.lengths, ROWS)
        same = [mean for mean in stages.means if (mean.x, mean.order, mean.lengths, mean.block) == wanted]
        if same and same[0] not in found.values():
            found[operand] = same[0]
    return found


def _rounding(stages: Stages, name: str) -> Quantise:
    op = stages.rounding(name)
    if op is None:
        raise LoweringError(f"{name} is rounded elsewhere")
    return op


def _need(holds: bool, reason: str) -> None:
    if not holds:
        raise LoweringError(f"Hopper's kernel of 8 bits: {reason}")


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
