"""The pytest side of the kit: options, the report, and the rule that no evidence is not a pass.

Opted into by a project's conftest, ``pytest_plugins = ["rainfusion.testing.pytest_plugin"]``, or by ``-p``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rainfusion.testing.environment import environment
from rainfusion.testing.report import Report, Result

PROPERTY = "rainfusion"
_WITH_ASSERTIONS = ("rainfusion.testing.contract", "rainfusion.testing.huge")
pytest.register_assert_rewrite(*(name for name in _WITH_ASSERTIONS if name not in sys.modules))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the four options of the kit."""
    group = parser.getgroup("rainfusion", "rainfusion conformance")
    group.addoption("--rainfusion-backend", metavar="NAME", help="the backend under test")
    group.addoption("--rainfusion-device", metavar="ADDRESS", help="its device, such as cuda:0 (default: its best)")
    group.addoption("--rainfusion-report", metavar="FILE", type=Path, help="write the outcome of every test as JSON")
    group.addoption("--rainfusion-huge", action="store_true", help="also tensors of 2**31 elements: 22 GB on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker, and start recording in the process that reports."""
    config.addinivalue_line("markers", "kit: the conformance kit")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config), "rainfusion-recorder")


def note(item: pytest.Item) -> dict[str, Any]:
    """What the report will say about a test, JSON that grows while the test runs.

    It travels to the process that reports in pytest's own user properties.
    """
    item.user_properties.append((PROPERTY, {"test": item.name}))  # type: ignore[arg-type]
    return item.user_properties[-1][1]  # type: ignore[return-value]


class Recorder:
    """Collects the tests of the kit, in the process that reports; writes the report when they are done."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Fold one phase of one test into its record."""
        noted = dict(report.user_properties).get(PROPERTY)
        if not isinstance(noted, dict):
            return
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test.update(noted)
        test["seconds"] = round(test["seconds"] + report.duration, 4)
        if not report.passed:
            test["outcome"], test["reason"] = _outcome(report), _reason(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report, whatever happened, and fail a run that shows nothing."""
        path = self.config.getoption("--rainfusion-report")
        if path is not None and len(self._targets) < 2:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._report().to_json(), encoding="utf-8")
        if self.problem:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say why the run failed though no test did."""
        if self.problem:
            terminalreporter.write_line(f"rainfusion: {self.problem}", red=True)

    @property
    def problem(self) -> str:
        """What keeps this run from being evidence; empty where nothing does."""
        if self.config.getoption("collectonly"):
            return ""
        cases = [test for test in self.tests.values() if "observation" in test]
        passed = any(test["outcome"] == "passed" for test in cases or self.tests.values())
        if not passed and (self.tests or self.config.getoption("--rainfusion-backend")):
            return "no evidence: no case of the conformance kit passed"
        if len(self._targets) > 1 and self.config.getoption("--rainfusion-report"):
            return f"no report: it is about one backend on one device, and these ran: {', '.join(self._targets)}"
        return ""

    @property
    def _targets(self) -> dict[str, dict[str, Any]]:
        found = [test["target"] for test in self.tests.values() if "target" in test]
        return {f"{target['backend']} on {target['device']}": target for target in found}

    def _report(self) -> Report:
        nowhere = dict.fromkeys(("backend", "device", "device_name", "stand_in"), "")
        return Report(
            [*self._targets.values(), nowhere][0], environment(), [*map(Result.from_json, self.tests.values())]
        )


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed"
    if report.failed:
        return "failed" if report.when == "call" else "error"
    return "skipped"


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail).removeprefix("reason: ")
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longrepr if crash is None else crash.message).partition("\n")[0]
