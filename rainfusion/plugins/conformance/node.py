"""Nodes: each part of the plan on its own, so that a failure names the part."""

from __future__ import annotations

from rainfusion.plugins.conformance.cases import Case
from rainfusion.plugins.conformance.evidence import Evidence
from rainfusion.plugins.conformance.level import Level, check_choice, check_values, take_up
from rainfusion.plugins.conformance.target import Target


class Node(Level):
    """Attention under a mask that is given, and the mask that is selected."""

    def test_attend(self, target: Target, case: Case, evidence: Evidence) -> None:
        """Output and what omitted blocks add are right under a given mask (all keys if dense).

        The log-sum-exp is asked for where the case does: a kernel may compute in another way for it.
        """
        take_up(case, target, evidence)
        mask = None if case.plan().is_dense else case.mask()
        check_values(case, mask, target.under(case, mask, lse="%lse" in case.returns), evidence)

    def test_select(self, target: Target, selecting_case: Case, evidence: Evidence) -> None:
        """Means, scores and selection choose the right blocks, and exactly as many as planned."""
        take_up(selecting_case, target, evidence)
        check_choice(selecting_case, target.selected(selecting_case), evidence)
