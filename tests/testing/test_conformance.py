"""The built-in backends that run everywhere, through the kit that third parties use."""

from rainfusion.testing import ConformanceSuite


class TestReference(ConformanceSuite):
    backend = "reference"


class TestTorch(ConformanceSuite):
    backend = "torch"
    device = "cpu"
