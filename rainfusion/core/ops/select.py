"""select: which key blocks every query block keeps, by quotas, by softmax mass, or by both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from array_api_compat import array_namespace
from array_api_compat import device as device_of

from rainfusion.core.checks import as_int, as_share, one_of
from rainfusion.core.errors import PlanFormatError
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.ops.base import Array, Op, ValueType, expect, operand, result
from rainfusion.core.ops.means import expect_lengths, log_counts, valid_counts

OVER = ("free", "all")


@dataclass(frozen=True, kw_only=True)
class Select(Op):
    """The blocks to attend, bool like the score: chosen ones, and all protected rows and columns.

    Every unprotected row keeps the ``quotas`` best unprotected columns, ties to the lower index; with `mass`, also the
    fewest best ones that, with the protected columns, reach that share of the row's softmax over blocks, each block
    weighted by its tokens. A NaN score counts as minus infinity.

    Operands:
        score: ``[B, H, q blocks, key blocks]``.
        quotas: int ``[H or 1, unprotected q blocks]``, clamped to the number of candidates.
        lengths: int32 ``[B]``; columns whose first token is at or beyond it are taken last.

    Attributes:
        mass: share of the softmax mass to reach, in [0, 1], or None.
        over: ``"free"``, or ``"all"``: the quotas' best columns are taken from all of them and protection is added on
            top, as the code published with RainFusion2.0 does.
        q, kv: how either side is cut into blocks.
    """

    name: ClassVar[str] = "select"
    score: str = operand()
    quotas: str = operand()
    lengths: str | None = operand(optional=True)
    mask: str = result()
    q: BlockedAxis
    kv: BlockedAxis
    mass: float | None = None
    over: str = "free"

    def __post_init__(self) -> None:
        one_of(self.over, OVER, "over", PlanFormatError)
        if self.mass is not None:
            as_share(self.mass, "mass", PlanFormatError, top=True)

    def meaning(self, score: Array, quotas: Array, lengths: Array | None) -> Array:
        return select(score, quotas, lengths, q=self.q, kv=self.kv, mass=self.mass, over=self.over)

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        score, quotas = types["score"], types["quotas"]
        blocks = (self.q.blocks, self.kv.blocks)
        expect(
            len(score.shape) == 4 and score.shape[2:] == blocks,
            f"{self.score} is {score}; select needs {list(blocks)} blocks",
        )
        heads, rows = score.shape[1], self.q.free_blocks
        fits = quotas.shape in ((1, rows), (heads, rows)) and quotas.dtype in ("int32", "int64")
        expect(fits, f"{self.quotas} is {quotas}; quotas are int32 [{heads} or 1, {rows}]")
        expect_lengths(types.get("lengths"), score.shape[0], self.lengths)
        return {"mask": ValueType(score.shape, "bool")}

    def encode(self, attribute: str) -> Any:
        value = getattr(self, attribute)
        return asdict(value) if isinstance(value, BlockedAxis) else value

    @classmethod
    def decode(cls, attribute: str, value: Any) -> Any:
        return _axis(value) if attribute in ("q", "kv") else super().decode(attribute, value)

    def details(self) -> dict[str, Any]:
        protected = (self.q.blocks - self.q.free_blocks, self.kv.blocks - self.kv.free_blocks)
        shown: dict[str, Any] = {"protect": protected if any(protected) else None, "mass": self.mass}
        if self.over != "free":
            shown["over"] = self.over
        return {key: value for key, value in shown.items() if value is not None}


def select(
    score: Array,
    quotas: Array,
    lengths: Array | None = None,
    *,
    q: BlockedAxis,
    kv: BlockedAxis,
    mass: float | None = None,
    over: str = "free",
) -> Array:
    """The definition of `Select`."""
    xp = array_namespace(score)
    lowest = xp.full_like(score, -math.inf)
    score = xp.where(xp.isnan(score), lowest, score)
    if lengths is not None:
        start = xp.arange(kv.blocks, device=device_of(score)) * kv.block
        score = xp.where((start >= lengths[:, None])[:, None, None, :], lowest, score)
    rows = score[..., : q.free_blocks, :]
    quotas = quotas[..., None]
    if mass is None:
        kept = _best(rows if over == "all" else rows[..., : kv.free_blocks], quotas, xp)
    else:
        kept = _reaching(rows, mass, quotas if over == "free" else xp.zeros_like(quotas), lengths, kv, xp)
        if over == "all":
            best = _best(rows, quotas, xp)
            kept = xp.concat([kept, xp.zeros_like(best[..., kv.free_blocks :])], axis=-1) | best
    columns = xp.ones_like(rows[..., kv.free_blocks :], dtype=xp.bool)
    kept = xp.concat([kept[..., : kv.free_blocks], columns], axis=-1)
    return xp.concat([kept, xp.ones_like(score[..., q.free_blocks :, :], dtype=xp.bool)], axis=-2)


def _best(score: Array, quotas: Array, xp: Any) -> Array:
    """Exactly ``quotas[h, i]`` columns of row i, the highest first, ties to the lower index (Law 2).

    What beats the quota-th best score is in; what equals it fills the places left, from the lowest index.
    """
    if score.shape[-1] == 0:
        return xp.astype(score, xp.bool)
    quotas = xp.clip(xp.astype(quotas, xp.int64), min=0, max=score.shape[-1])
    place = xp.broadcast_to(xp.clip(quotas - 1, min=0), (*score.shape[:-1], 1))
    threshold = xp.take_along_axis(xp.sort(score, axis=-1, descending=True), place, axis=-1)
    better, equal = score > threshold, score == threshold
    left = quotas - xp.sum(better, axis=-1, keepdims=True, dtype=xp.int64)
    return better | (equal & (xp.cumulative_sum(equal, axis=-1, dtype=xp.int64) <= left))


def _reaching(score: Array, mass: float, quotas: Array, lengths: Array | None, kv: BlockedAxis, xp: Any) -> Array:
    """The fewest best unprotected columns that, with the protected ones, reach the mass, and at least the quotas."""
    logits = xp.clip(score + _log_tokens(score, lengths, kv, xp), max=xp.finfo(score.dtype).max)
    peak = xp.max(logits, axis=-1, keepdims=True)  # an infinite score takes all the mass
    weights = xp.exp(logits - xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak)))
    total = xp.sum(weights, axis=-1, keepdims=True)
    free, protected = weights[..., : kv.free_blocks], weights[..., kv.free_blocks :]
    best_first = xp.argsort(score[..., : kv.free_blocks], axis=-1, descending=True, stable=True)
    sorted_weights = xp.take_along_axis(free, best_first, axis=-1)
    before = xp.cumulative_sum(sorted_weights, axis=-1) - sorted_weights
    before = before + xp.sum(protected, axis=-1, keepdims=True)
    place = xp.arange(kv.free_blocks, device=device_of(score))
    kept = (before < mass * total) | (place < quotas)
    rank = xp.argsort(best_first, axis=-1, stable=False)  # no two are equal, and NumPy sorts faster so
    return xp.take_along_axis(kept, rank, axis=-1)


def _log_tokens(score: Array, lengths: Array | None, kv: BlockedAxis, xp: Any) -> Array:
    """The log of every block's valid tokens, ``[blocks]``, or ``[B, 1, 1, blocks]`` under lengths."""
    if lengths is None:
        return log_counts(kv.length, kv.block, score, xp)
    counts = xp.astype(valid_counts(lengths, kv.length, kv.block, xp), score.dtype)
    return xp.log(counts)[:, None, None, :]


def _axis(record: Any) -> BlockedAxis:
    """One side from JSON."""
    known = {"length", "block", "ordered", "protected_from"}
    expect(isinstance(record, dict) and {*record} == known, f"a side has {', '.join(sorted(known))}")
    length, block = (as_int(record[name], name, PlanFormatError) for name in ("length", "block"))
    first = as_int(record["protected_from"], "protected_from", PlanFormatError, minimum=0)
    expect(first <= length, f"protected_from={first} lies beyond the {length} tokens of the side")
    return BlockedAxis(length, block, bool(record["ordered"]), first)
