"""ConformanceSuite: everything a backend must do, in one class to subclass."""

from __future__ import annotations

import pytest

from rainfusion.testing.cases import Case
from rainfusion.testing.contract import Contract
from rainfusion.testing.huge import Huge
from rainfusion.testing.level import Level, Note, check
from rainfusion.testing.pieces import Pieces
from rainfusion.testing.target import Target


class Cases(Level):
    """Every case: each part of the plan on its own, so that a failure names the part, and the whole call."""

    def test_attend(self, target: Target, case: Case, note: Note) -> None:
        """Output and what omitted blocks add are right under a given mask (all keys if dense).

        The log-sum-exp is asked for where the case does: a kernel may compute in another way for it.
        """
        check(target, case, "attend", note)

    def test_select(self, target: Target, selecting_case: Case, note: Note) -> None:
        """Means, scores and selection choose the right blocks, and exactly as many as planned."""
        check(target, selecting_case, "select", note)

    def test_attention(self, target: Target, case: Case, note: Note) -> None:
        """What `rainfusion.attention` returns is right: the mask, and output and log-sum-exp under that mask."""
        check(target, case, "attention", note)


@pytest.mark.kit
class ConformanceSuite(Contract, Cases, Pieces, Huge):
    """Everything a backend must do.

        class TestAcme(ConformanceSuite):
            backend = "acme"

    A capability that is claimed and fails is a failure; a case beyond the capabilities is skipped with the
    capability named; without a device every test is an error.
    """
