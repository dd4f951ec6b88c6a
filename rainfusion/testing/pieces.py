"""Pieces: attention to the keys piece by piece, as devices in a ring compute it, is attention to all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pytest

from rainfusion.core import ops, passes
from rainfusion.core.axis import BlockedAxis
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask import BlockMask
from rainfusion.core.policies import Fixed
from rainfusion.testing.cases import Case, claimed_case
from rainfusion.testing.level import Level, fail_if
from rainfusion.testing.observation import Observation, verdict
from rainfusion.testing.observe import with_output
from rainfusion.testing.target import Target

RETURNS = ("%out", "%lse")


@dataclass(frozen=True)
class Piece:
    """Some neighbouring blocks of the keys: which blocks, and which of their tokens."""

    blocks: slice
    tokens: slice

    @property
    def length(self) -> int:
        """Key tokens."""
        return int(self.tokens.stop - self.tokens.start)


class Pieces(Level):
    """Attention under columns of a mask, merged by log-sum-exp, which several devices rely on."""

    @pytest.mark.parametrize("count", [2, 4])
    @pytest.mark.parametrize("kept", ["mixed", "one", "some_none"])
    @pytest.mark.parametrize("omitted", ["drop", "summary"])
    def test_pieces_of_the_keys(self, target: Target, dtype: str, omitted: str, kept: str, count: int) -> None:
        """Pieces of the keys under their columns of a mask, merged by log-sum-exp, are all keys under the whole mask.

        A row that keeps nothing of a piece does not count there. To summarise skipped blocks, their means are given.
        """
        claims = target.capabilities
        case = claimed_case(
            claims, dtype=dtype, omitted=omitted, kept=kept, policy=Fixed(), returns=RETURNS, heads=2, kv_heads=1
        )
        if refused := target.objections(case):
            pytest.skip(f"{target} does not claim it: {refused}")
        seen = Observation("attend", f"{omitted} of {kept} in {count} pieces", dtype)
        found = [_attended(target, case, piece) for piece in _pieces(case.layout.axis(case.lengths[1], 1), count)]
        out, lse = reduce(lambda a, b: ops.merge(*a, *b), found)
        seen = with_output(seen, case, case.mask(), {"%out": out, "%lse": lse})
        fail_if(verdict(seen), seen.case)


def _pieces(axis: BlockedAxis, count: int) -> Iterator[Piece]:
    """The keys in as many pieces as there are blocks, at most `count`."""
    for blocks in np.array_split(np.arange(axis.blocks), min(count, axis.blocks)):
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        yield Piece(slice(first, last), slice(first * axis.block, min(last * axis.block, axis.length)))


def _attended(target: Target, case: Case, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp over a piece, float64."""
    part = replace(
        case, problem=replace(case.problem, kv_len=piece.length), layout=TokenLayout(block=case.layout.block)
    )
    plan = passes.from_means(part.plan(returns=RETURNS))
    q, k, v = target.tensors(case)
    tokens = (slice(None), piece.tokens) if case.problem.tensor_layout == "bshd" else (..., piece.tokens, slice(None))
    blocks = np.ascontiguousarray(case.mask().blocks[..., piece.blocks])
    mask = target.mask(BlockMask(blocks, case.lengths[0], piece.length, case.layout.block))
    given: dict[str, Any] = {"q": q, "k": k[tokens], "v": v[tokens], "mask": mask, **_means(target, case, piece)}
    executable = target.lower(plan)
    results = target.results(plan, executable.run({name: x for name, x in given.items() if plan.takes(f"%{name}")}))
    return results["%out"], results["%lse"]


def _means(target: Target, case: Case, piece: Piece) -> Mapping[str, Any]:
    """The means of the piece's blocks of keys and values, on the device."""
    axis = case.layout.axis(case.lengths[1], 1)
    starts, wide = np.arange(axis.blocks) * axis.block, "float64" if case.problem.dtype == "float64" else "float32"
    found = {}
    for name, x in zip(("kb", "vb"), case.inputs()[1:], strict=True):
        means = np.add.reduceat(x, starts, axis=2) / axis.counts[:, None]
        found[name] = target.backend.from_host(
            np.ascontiguousarray(means[:, :, piece.blocks], wide), target.device, wide
        )
    return found
