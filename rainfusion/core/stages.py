"""Stages: the operations of a segment by what they are, checked to be one attention.

A kernel that covers several operations at once computes what planned attention computes: means, scores, a selection,
attention by it, summaries of the rest. A segment may hold operations of the same types that are wired another way;
`Stages.of` refuses those, so that no kernel computes something else than the program says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from rainfusion.core.errors import LoweringError
from rainfusion.core.ops import (
    Attend,
    AttendMeans,
    AttendMeansQuantised,
    AttendQuantised,
    BlockMean,
    BlockScore,
    Merge,
    Op,
    Quantise,
    Select,
)

if TYPE_CHECKING:
    from rainfusion.core.backend import Segment

AnyOp = TypeVar("AnyOp", bound=Op)


@dataclass(frozen=True)
class Stages:
    """The operations of one attention, or of a part of it; None where the segment has none of a kind.

    Attributes:
        means: the block means, each of which may be returned or read by what follows.
        quantised: what is rounded to 8 bits; the attentions are then `AttendQuantised` and `AttendMeansQuantised`.
    """

    means: tuple[BlockMean, ...]
    quantised: tuple[Quantise, ...]
    score: BlockScore | None
    select: Select | None
    attend: Attend | None
    attend_means: AttendMeans | None
    merge: Merge | None

    @classmethod
    def of(cls, segment: Segment) -> Stages:
        """The stages of a segment.

        Raises:
            LoweringError: operations of another type, two of a kind, or operations that read other values than those
                of one attention; the message says which.
        """
        means = tuple(op for op in segment.ops if type(op) is BlockMean)
        quantised = tuple(op for op in segment.ops if type(op) is Quantise)
        stages = cls(
            means,
            quantised,
            _only(segment, BlockScore),
            _only(segment, Select),
            _only(segment, Attend, AttendQuantised),
            _only(segment, AttendMeans, AttendMeansQuantised),
            _only(segment, Merge),
        )
        foreign = [op for op in segment.ops if op not in (*means, *quantised, *stages._single)]
        if foreign:
            raise LoweringError(f"`{foreign[0]}` is not part of an attention that is known here")
        stages._check_wiring()
        return stages

    def rounding(self, name: str | None) -> Quantise | None:
        """The operation whose rounded tensor a value is; None where it comes from outside."""
        return next((op for op in self.quantised if op.y == name), None)

    def mean(self, name: str | None) -> BlockMean | None:
        """The block mean that makes a value; None where it comes from outside."""
        return next((op for op in self.means if op.mean == name), None)

    @property
    def out(self) -> str | None:
        """The name of the attention's output."""
        last = self.merge or self.attend_means or self.attend
        return None if last is None else last.out

    @property
    def lse(self) -> str | None:
        """The name of its log-sum-exp; None where it is not needed."""
        last = self.merge or self.attend_means or self.attend
        return None if last is None else last.lse

    @property
    def _single(self) -> tuple[Op | None, ...]:
        return (self.score, self.select, self.attend, self.attend_means, self.merge)

    def _check_wiring(self) -> None:
        score, chosen, attend, rest, merge = self.score, self.select, self.attend, self.attend_means, self.merge
        if score and chosen:
            _need(chosen.score == score.score, "the selection reads another score")
        if chosen and attend:
            _need(attend.mask == chosen.mask, "attention reads another mask than is selected")
        if chosen and rest:
            _need(rest.mask == chosen.mask, "the means are attended by another mask than is selected")
        if attend and rest:
            shared = ("q", "mask", "order", "inverse", "lengths", "block", "scale", "lengths_on_queries")
            _need(
                all(getattr(attend, f) == getattr(rest, f) for f in shared),
                "the two attentions differ in what they read",
            )
            in_8_bits = {isinstance(attend, AttendQuantised), isinstance(rest, AttendMeansQuantised)}
            _need(len(in_8_bits) == 1, "tokens and means are attended in different precisions")
            _need(merge is not None, "two attentions that nothing joins")
        if merge:
            _need(attend is not None and rest is not None, "a merge of other attentions")
            assert attend is not None
            assert rest is not None
            sides = {(merge.out_a, merge.lse_a), (merge.out_b, merge.lse_b)}
            _need(sides == {(attend.out, attend.lse), (rest.out, rest.lse)}, "the merge joins other values")


def _only(segment: Segment, kind: type[AnyOp], *kinds: type[AnyOp]) -> AnyOp | None:
    found = [op for op in segment.ops if type(op) in (kind, *kinds)]
    _need(len(found) < 2, f"more than one {kind.name}")
    return found[0] if found else None  # type: ignore[return-value]


def _need(holds: bool, reason: str) -> None:
    if not holds:
        raise LoweringError(f"not one attention: {reason}")
