"""Which passes over q, k and v a segment needs: whatever reads the same tokens in the same way shares one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from rainfusion.backends.triton.eight_bits import EightBits
from rainfusion.backends.triton.operands import Quantised
from rainfusion.core.backend import Segment
from rainfusion.core.stages import Stages


@dataclass(frozen=True)
class Fold:
    """One pass over a tensor: what it reads, and what is made of it.

    Attributes:
        x, order, lengths: names of the values it reads; block: tokens a block.
        mean, half_mean: names of the means that are made in float32, or in the dtype of the tokens.
        attended_as: the operands of the attention that the tokens themselves are, out of q, k, v.
    """

    x: str
    order: str | None
    lengths: str | None
    block: int
    mean: str | None = None
    half_mean: str | None = None
    attended_as: tuple[str, ...] = ()


@dataclass
class Blocks:
    """What the folds of one call made.

    Attributes:
        tokens: the tensors that are attended, by operand: q, k, v.
        means, half_means: block means by name.
        quantised: what is attended in 8 bits.
    """

    tokens: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    half_means: dict[str, Tensor] = field(default_factory=dict)
    quantised: Quantised | None = None


def folds_of(
    stages: Stages, segment: Segment, eight_bits: EightBits | None, *, has_wide_means: bool
) -> tuple[Fold, ...]:
    """The passes over tensors that a segment needs; what reads the same tokens the same way shares a pass.

    Attention in 8 bits has passes of its own, and these are those for the means that it does not make on the way.
    """
    if eight_bits is not None:
        others = [op for op in stages.means if op not in eight_bits.means.values()]
        return tuple(Fold(op.x, op.order, op.lengths, op.block, op.mean) for op in others)
    attend, rest, score = stages.attend, stages.attend_means, stages.score
    attended_means = {rest.kb, rest.vb} if rest is not None else set()
    scored = {score.qb, score.kb} if score is not None else set()
    folds: list[Fold] = []
    for op in stages.means:
        is_attended = op.mean in attended_means
        is_wide = segment.wants(op.mean) or op.mean in scored or (is_attended and has_wide_means)
        is_half = is_attended and not has_wide_means
        mean, half_mean = (op.mean if is_wide else None), (op.mean if is_half else None)
        folds.append(Fold(op.x, op.order, op.lengths, op.block, mean, half_mean))
    if attend is not None:
        q_lengths = attend.lengths if attend.lengths_on_queries else None
        _read_tokens(folds, "q", attend.q, attend.order, q_lengths, attend.block[0])
        for operand in ("k", "v"):
            _read_tokens(folds, operand, getattr(attend, operand), attend.kv_order, attend.lengths, attend.block[1])
    return tuple(folds)


def _read_tokens(folds: list[Fold], operand: str, x: str, order: str | None, lengths: str | None, block: int) -> None:
    """Let a pass that reads `x` in this way also give its tokens to the attention, or add one that does.

    Queries need no zeros beyond their length, for what is computed of them is not read; a pass without any will do.
    """
    allowed = (lengths, None) if operand == "q" else (lengths,)
    for i, fold in enumerate(folds):
        if (fold.x, fold.order, fold.block) == (x, order, block) and fold.lengths in allowed:
            folds[i] = replace(fold, attended_as=(*fold.attended_as, operand))
            return
    folds.append(Fold(x, order, None if operand == "q" else lengths, block, attended_as=(operand,)))
