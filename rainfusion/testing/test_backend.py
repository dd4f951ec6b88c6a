"""What ``pytest -p rainfusion.testing.pytest_plugin --pyargs rainfusion.testing --rainfusion-backend NAME`` runs."""

from rainfusion.testing.suite import ConformanceSuite


class TestBackend(ConformanceSuite):
    """The suite, on the backend and device named on the command line."""
