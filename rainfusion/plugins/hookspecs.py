"""The three hooks a plugin may implement. Entry-point group: ``rainfusion``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pluggy

from rainfusion.core.backend import BackendSpec
from rainfusion.core.choice import Candidate
from rainfusion.core.plan import Plan

hookspec = pluggy.HookspecMarker("rainfusion")


@hookspec
def rainfusion_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Announce backends. Must import nothing heavy: the specs are strings."""


@hookspec(firstresult=True)
def rainfusion_choose_backend(plan: Plan, candidates: Sequence[Candidate]) -> Candidate | None:
    """Override the automatic choice: return one of `candidates` (best first), or None to abstain.

    Asked once for a plan and a kind of tensors; the answer is kept with the executable.
    """


@hookspec
def rainfusion_conformance_cases() -> Iterable[object]:  # type: ignore[empty-body]
    """More `rainfusion.testing.Case` objects for the conformance kit, run for every backend under test."""
