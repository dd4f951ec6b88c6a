"""The report of a run: where it ran, what is claimed, what every test saw. JSON, written also on failure.

{"rainfusion_report": 1, "environment": {...},
 "suites": [{"backend", "device", "device_name", "capabilities", "tests": [{...}]}]}
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rainfusion.plugins.conformance.evidence import PROPERTY

if TYPE_CHECKING:
    import pytest

REPORT_VERSION = 1
_PACKAGES = ("rainfusion", "numpy", "torch", "torch-npu", "openvino", "array-api-compat", "pytest")


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
        record = {"rainfusion_report": REPORT_VERSION, "environment": environment(), "suites": [*suites.values()]}
        return json.dumps(record, indent=1, allow_nan=False)


def environment() -> dict[str, Any]:
    """Where and when: versions, commit, platform, date."""
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _commit() -> str | None:
    """The commit of the checkout that rainfusion runs from, ``-dirty`` where it was changed; None outside one.

    On a machine that has the files without their history, ``RAINFUSION_COMMIT`` says it.
    """
    if said := os.environ.get("RAINFUSION_COMMIT"):
        return said
    here = Path(__file__).parent
    try:  # only if this file is tracked: an environment may lie inside a checkout of something else
        for command in (["ls-files", "--error-unmatch", __file__], ["describe", "--always", "--dirty", "--exclude=*"]):
            done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
