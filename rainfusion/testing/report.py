"""The report of a run: where it ran, what is claimed, and every test with what it observed. JSON, a test a line.

The conformance kit writes it (``pytest --rainfusion-report``), so does ``rainfusion parity --report``, and the records
of the hardware matrix are such files. Any two of them can be compared. docs/conformance.md shows one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rainfusion.core.errors import RainfusionError
from rainfusion.core.files import read_regular
from rainfusion.testing.observation import Agreement, Observation, agree, text, verdict

REPORT_VERSION = 3

KIT_REVISION = 1
"""Of what passing means. Raise it when the oracle, a tolerance or the inputs of a case change; not for new cases."""

_MOST_BYTES = 32 << 20  # a report of the whole kit takes one; read, it may take thirty times that


class ReportError(RainfusionError, ValueError):
    """A file that is no report, or two reports that cannot be compared."""


@dataclass(frozen=True)
class Result:
    """One test: its outcome (``passed``, ``failed``, ``error``, ``skipped``, ``xfailed``) and what it observed."""

    test: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    observation: Observation | None = None

    @classmethod
    def of(cls, seen: Observation) -> Result:
        """The result of an observation outside pytest."""
        reason = seen.refused or "; ".join(verdict(seen))
        outcome = "skipped" if seen.refused else "failed" if reason else "passed"
        return cls(f"test_{seen.level}[{seen.case}]", outcome, 0.0, reason, seen)

    @property
    def dtype(self) -> str:
        """The dtype it is about; empty for a test of none."""
        parameter = self.test.partition("[")[2].removesuffix("]")
        return self.observation.dtype if self.observation else parameter if "float" in parameter else ""

    def to_json(self) -> dict[str, Any]:
        """The fields that hold something."""
        seen = self.observation and self.observation.to_json()
        return {key: x for key, x in {**vars(self), "observation": seen}.items() if x}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Result:
        """Read what `to_json` gave."""
        words = {name: text(record.get(name, "")) for name in ("test", "outcome", "reason")}
        seen = Observation.from_json(record["observation"]) if "observation" in record else None
        return cls(seconds=float(record.get("seconds", 0)), observation=seen, **words)


@dataclass(frozen=True)
class Report:
    """What one backend did on one device.

    Attributes:
        target, environment: as `Target.described` and `environment` give them.
        kit: `KIT_REVISION` at that time.
        benchmark: what a benchmark of the same target measured.
    """

    target: Mapping[str, Any]
    environment: Mapping[str, Any]
    results: Sequence[Result]
    kit: int = KIT_REVISION
    benchmark: Mapping[str, Any] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """Backend, device and machine in words."""
        device, cpu = text(self.target["device_name"]), text(self.environment["cpu"])
        where = device if cpu in device else f"{device}, {cpu}"
        imitated = f", imitated by {text(self.target['stand_in'])}" if self.target["stand_in"] else ""
        return f"{text(self.target['backend'])} on {text(self.target['device'])} ({where}{imitated})"

    @property
    def observations(self) -> dict[tuple[str, str], Observation]:
        """What was observed, by level and case."""
        return {(r.observation.level, r.observation.case): r.observation for r in self.results if r.observation}

    def only(self, wanted: Callable[[str], bool]) -> Report:
        """The same report with the cases of wanted names alone."""
        return replace(self, results=[r for r in self.results if r.observation and wanted(r.observation.case)])

    def to_json(self) -> str:
        """The file."""
        head = {"rainfusion_report": REPORT_VERSION, **vars(self)}
        tests = [json.dumps(result.to_json(), allow_nan=False) for result in head.pop("results")]
        return (
            json.dumps(head, indent=1, allow_nan=False)[:-2] + ',\n "tests": [\n  ' + ",\n  ".join(tests) + "\n ]\n}\n"
        )


def read_report(path: Path) -> Report:
    """Read a report; nothing in it is trusted.

    Raises:
        ReportError: the file cannot be read, or is not such a report.
    """
    try:
        record = json.loads(read_regular(path, _MOST_BYTES).decode("utf-8"))
        if record["rainfusion_report"] != REPORT_VERSION:
            raise ValueError(f"format {text(record['rainfusion_report'])}; this rainfusion reads {REPORT_VERSION}")
        results = [Result.from_json(test) for test in record["tests"]]
        report = Report(record["target"], record["environment"], results, int(record["kit"]), record["benchmark"])
        if not report.who or not isinstance(report.benchmark, dict):
            raise ValueError("target, environment and benchmark are objects")
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        said = f"it lacks {error}, or does not know it" if isinstance(error, KeyError) else text(error)
        raise ReportError(f"{path} is not a report of this rainfusion ({said}); record it again") from error
    return report


def compare(a: Report, b: Report) -> list[Agreement]:
    """Compare the cases that both reports have.

    Raises:
        ReportError: other inputs, another kit, or no case in common: there is nothing to compare.
    """
    if a.kit != b.kit:
        raise ReportError(
            f"the reports were made with revisions {a.kit} and {b.kit} of the conformance kit, which measure "
            "differently; make both with one rainfusion"
        )
    pairs = [(seen, b.observations[key]) for key, seen in a.observations.items() if key in b.observations]
    if not pairs:
        raise ReportError("the reports have no case in common; make both with the same --cases")
    both = [(x, y) for x, y in pairs if not (x.refused or y.refused)]
    other = [(x, y) for x, y in both if x.inputs != y.inputs]
    if other:
        x, y = other[0]
        seeds = f" (seeds {x.seed} and {y.seed})" if x.seed != y.seed else ""
        raise ReportError(
            f"the reports were made of other inputs{seeds}: {len(other)} of {len(both)} observations differ, the first "
            f"is of {x.case}; make both with the same --seed and one rainfusion"
        )
    return [agree(x, y) for x, y in pairs]
