"""Tensors of more than 2³¹ elements, where an offset in 32 bits reads elsewhere. Only on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

from rainfusion.core.policies import Fixed
from rainfusion.testing.cases import Case, claimed_case
from rainfusion.testing.level import Level, fail_if
from rainfusion.testing.numbers import worst_error
from rainfusion.testing.observation import Observation, verdict
from rainfusion.testing.observe import with_choice, with_output
from rainfusion.testing.target import Target

ELEMENTS = 2**31
_HEADS = 61  # prime: an offset that wraps round falls on a head with other numbers
_TENSORS = 5  # q, k, v, the output, and as much again for the backend to work in


class Huge(Level):
    """A small problem, and its heads over and over until their offsets exceed 32 bits."""

    def test_huge(self, target: Target, request: pytest.FixtureRequest, layout: str) -> None:
        """Every head beyond 2³¹ elements is what it is in a small tensor, in either tensor layout."""
        if not request.config.getoption("--rainfusion-huge"):
            pytest.skip("not asked for: --rainfusion-huge")
        if layout not in target.capabilities.tensor_layouts:
            pytest.skip(f"{target} does not claim it: no tensor layout {layout}")
        heads = huge_heads(target, layout)
        require_memory(target, heads)
        check_heads(target, heads)


@dataclass(frozen=True)
class Heads:
    """A small case, and how many copies of its heads are laid side by side."""

    case: Case
    copies: int

    @property
    def large(self) -> Case:
        """The case of all copies."""
        heads = self.copies * self.case.problem.heads
        return replace(self.case, problem=replace(self.case.problem, heads=heads, kv_heads=heads))

    def split(self, array: Any, axis: int) -> Iterator[Any]:
        """The copies, one after the other."""
        heads = self.case.problem.heads
        for start in range(0, self.copies * heads, heads):
            yield array[(slice(None),) * axis + (slice(start, start + heads),)]


def huge_heads(target: Target, layout: str, elements: int = ELEMENTS) -> Heads:
    """Copies of a small problem within the claims, until the tensors have more than `elements`."""
    claims = target.capabilities
    dim, block = max(claims.head_dims or [128]), max(claims.blocks or [(128, 128)])
    case = claimed_case(claims, block=block, heads=_HEADS, head_dim=dim, tensor_layout=layout)
    return Heads(case, elements // prod(case.problem.q_shape) + 1)


def require_memory(target: Target, heads: Heads) -> None:
    """Fail where the device cannot hold the tensors: what was asked for is never skipped."""
    problem, memory = heads.large.problem, target.device.memory
    needed = _TENSORS * prod(problem.q_shape) * {"float64": 8, "float32": 4}.get(problem.dtype, 2)
    if target.device.type == "cpu":
        pytest.fail(f"{target} computes in host memory; --rainfusion-huge is for accelerators", pytrace=False)
    if memory is not None and memory < needed:
        had = f"{target} has {memory / 1e9:.0f} GB"
        pytest.fail(f"{had}; --rainfusion-huge needs {needed / 1e9:.0f} GB", pytrace=False)


def check_heads(target: Target, heads: Heads) -> None:
    """Hold the small problem against the oracle, and every copy of its heads in the large one against the small one."""
    case, axis = heads.case, heads.case.problem.tensor_layout.index("h")
    mask = target.selected(case)
    small = target.under(case, mask, lse=False)
    seen = with_output(with_choice(Observation("attention", case.name), case, mask.blocks), case, mask, small)
    fail_if(verdict(seen), case)

    tensors = [array_namespace(x).concat([x] * heads.copies, axis=axis) for x in target.tensors(case)]
    problems = []
    selected = target.lower(heads.large.plan(returns=("%mask",)))(*tensors)
    for i, blocks in enumerate(heads.split(target.backend.to_host(selected.blocks), axis=1)):
        if ((blocks != mask.blocks) & ~seen.undecided).any():  # type: ignore[operator]
            problems.append(f"copy {i} of the heads selects other blocks")
    repeated = heads.large.block_mask(np.tile(mask.blocks, (1, heads.copies, 1, 1)))
    out = target.lower(heads.large.plan(policy=Fixed()))(*tensors, mask=target.mask(repeated))
    for i, part in enumerate(heads.split(out, axis)):
        error = worst_error(target.results(case.plan(), part)["%out"], small["%out"])
        if error > 2 * seen.allowed:
            problems.append(f"copy {i} of the heads is off by {error:.3g} (at most {2 * seen.allowed:.3g})")
    fail_if(problems[:3], f"{target}, {prod(tensors[0].shape)} elements")
