"""The report of a run: where it ran, what is claimed, what every test saw. JSON, written also on failure.

{"rainfusion_report": 2, "kit": 1, "environment": {...},
 "suites": [{"backend", "revision", "device", "device_name", "stand_in", "capabilities", "outcomes",
             "tests": [{...}]}]}
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rainfusion.plugins.conformance.environment import environment
from rainfusion.plugins.conformance.evidence import PROPERTY

if TYPE_CHECKING:
    import pytest

REPORT_VERSION = 2

KIT_REVISION = 1
"""Of what passing means. Raise it when the oracle, a tolerance or the inputs of a case change; not for new cases."""


@dataclass(eq=False)
class Recorder:
    """Collects the tests of the kit, in the process that reports; writes the report when they are done."""

    config: pytest.Config
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Fold one phase of one test into its record."""
        evidence = dict(report.user_properties).get(PROPERTY)
        if not isinstance(evidence, dict):
            return
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test.update(evidence)
        test["seconds"] = round(test["seconds"] + report.duration, 4)
        if not report.passed or hasattr(report, "wasxfail"):
            test["outcome"], test["reason"] = _outcome(report), _reason(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the report, whatever happened, and fail a run that shows nothing."""
        path = self.config.getoption("--rainfusion-report")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.as_json() + "\n", encoding="utf-8")
        if self.lacks_evidence:
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say why the run failed though no test did."""
        if self.lacks_evidence:
            terminalreporter.write_line("rainfusion: no evidence: no case of the conformance kit passed", red=True)

    @property
    def lacks_evidence(self) -> bool:
        """Whether the kit was to run and nothing passed, or no case where cases ran."""
        if self.config.getoption("collectonly"):
            return False
        cases = [test for test in self.tests.values() if "case" in test]
        passed = any(test["outcome"] == "passed" for test in cases or self.tests.values())
        return not passed and bool(self.tests or self.config.getoption("--rainfusion-backend"))

    def as_json(self) -> str:
        """The report."""
        suites: dict[str, dict[str, Any]] = {}
        for test in self.tests.values():
            target = test.get("target", {"backend": test.get("backend", ""), "device": ""})
            suite = suites.setdefault(json.dumps(target, sort_keys=True), {**target, "tests": []})
            suite["tests"].append({key: value for key, value in test.items() if key not in ("target", "backend")})
        for suite in suites.values():
            suite["outcomes"] = dict(Counter(test["outcome"] for test in suite["tests"]))
        head = {"rainfusion_report": REPORT_VERSION, "kit": KIT_REVISION, "environment": environment()}
        return as_lines({**head, "suites": [*suites.values()]})


def as_lines(record: dict[str, Any]) -> str:
    """A report as JSON with each test on a line of its own, so that two of them can be compared by eye."""
    tests = [test for suite in record["suites"] for test in suite["tests"]]
    folded = {**record, "suites": [{**suite, "tests": [None] * len(suite["tests"])} for suite in record["suites"]]}
    lines = iter([json.dumps(test, allow_nan=False) for test in tests])
    indented = json.dumps(folded, indent=1, allow_nan=False).splitlines()
    return "\n".join(line.replace("null", next(lines)) if line.strip(" ,") == "null" else line for line in indented)


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed"
    if report.failed:
        return "failed" if report.when == "call" else "error"
    return "skipped"


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longrepr if crash is None else crash.message).partition("\n")[0]
