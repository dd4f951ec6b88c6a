"""ConformanceSuite: all levels in one class to subclass."""

from __future__ import annotations

import pytest

from rainfusion.plugins.conformance.contract import Contract
from rainfusion.plugins.conformance.end_to_end import EndToEnd
from rainfusion.plugins.conformance.huge import Huge
from rainfusion.plugins.conformance.node import Node


# The cases are small; what is fast is another question than what is right.
@pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SpeedWarning")
class ConformanceSuite(Contract, Node, EndToEnd, Huge):
    """Everything a backend must do.

        class TestAcme(ConformanceSuite):
            backend = "acme"

    A capability that is claimed and fails is a failure; a case beyond the capabilities is skipped with the
    capability named; without a device every test is an error.
    """
