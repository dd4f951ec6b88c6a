"""Records: what a machine wrote about a target, ``results/<backend>-<chip>.json``, and whether it fits the target.

A record is the report of the conformance kit, with the benchmark's ratios under ``benchmark`` where there is one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rainfusion.matrix.targets import ANY, HARDWARE, MatrixError, Target
from rainfusion.plugins.conformance.report import KIT_REVISION, REPORT_VERSION

BAD = ("failed", "error")


@dataclass(frozen=True)
class Record:
    """One record.

    Attributes:
        environment: where and when it was made.
        suite: backend, device, claims and the tests.
        kit: revision of the conformance kit.
        ratios: of the benchmark: ``{"problem", "dtype", "baseline", "ratio"}``.
    """

    name: str
    kit: int
    environment: Mapping[str, Any]
    suite: Mapping[str, Any]
    ratios: tuple[Mapping[str, Any], ...] = ()

    @property
    def tests(self) -> list[Mapping[str, Any]]:
        """What every test saw."""
        return list(self.suite["tests"])

    def about(self, dtype: str) -> list[Mapping[str, Any]]:
        """The tests that say something about a dtype: its own, and those of no dtype."""
        return [test for test in self.tests if _dtype(test) in (dtype, None)]

    def cases(self) -> dict[str, str]:
        """The worst outcome of every case that was taken up, skipped ones left out."""
        ranks = ("passed", "xfailed", *BAD)
        found: dict[str, str] = {}
        for test in self.tests:
            if "case" in test and test["outcome"] in ranks:
                case, outcome = test["case"], test["outcome"]
                found[case] = max(found.get(case, outcome), outcome, key=ranks.index)
        return found

    def worst_share(self) -> float:
        """The worst error of an output as a share of what is allowed."""
        shares = [
            float(test["absolute"]) / test["tolerance"]
            for test in self.tests
            if test.get("tolerance") and test["outcome"] == "passed"
        ]
        return max(shares, default=0.0)

    def outcome(self, test: str) -> str:
        """The outcomes of the tests of one name, worst first; empty where there is none."""
        found = Counter(t["outcome"] for t in self.tests if t["test"].partition("[")[0] == test)
        return next((name for name in (*BAD, "xfailed", "skipped", "passed") if found[name]), "")


def _dtype(test: Mapping[str, Any]) -> str | None:
    parameter = str(test["test"]).partition("[")[2].removesuffix("]")
    return test.get("dtype") or (parameter if "float" in parameter else None)


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        MatrixError: no JSON, another format, or not exactly one suite.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["rainfusion_report"] != REPORT_VERSION:
            raise MatrixError(f"{path.name} has format {document['rainfusion_report']}; record it again")
        (suite,) = document["suites"]
        ratios = tuple(document.get("benchmark", {}).get("ratios", ()))
        return Record(path.stem, document["kit"], document["environment"], suite, ratios)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, MatrixError):
            raise
        raise MatrixError(f"{path.name} is not a record ({type(error).__name__}: {error}); record it again") from error


def misfits(record: Record, target: Target) -> Iterator[str]:
    """Why a record is none of that target: another backend, device, machine, or other claims."""
    suite, chip = record.suite, target.chip
    if suite["backend"] != target.backend:
        yield f"it is of backend {suite['backend']!r}"
    if suite["device"].partition(":")[0] != target.device:
        yield f"it ran on {suite['device']!r}, the target is a {target.device!r} device"
    name = record.environment["cpu"] if target.device == "cpu" else suite["device_name"]
    if chip.evidence == HARDWARE and not chip.is_called(name):
        yield f"the machine calls itself {name!r}, which is not like {' or '.join(map(repr, chip.recognise))}"
    if bool(suite["stand_in"]) != (chip.evidence != HARDWARE):
        was = f"imitated by {suite['stand_in']}" if suite["stand_in"] else "not imitated"
        yield f"the device was {was}, but {chip.key} is {chip.evidence}"
    claims = suite["capabilities"]
    for name, ours in (("dtypes", target.dtypes), ("blocks", target.blocks), ("head_dims", target.head_dims)):
        if _plain(ours) != _plain(claims[name]):
            yield f"it claims {name} {words(claims[name])}, targets.toml says {words(ours)}; correct one of them"


def untraceable(record: Record) -> str:
    """Why nobody can tell which code a record was made of; empty where a commit says it."""
    commit = record.environment["commit"]
    if not commit:
        return "it was made of files without their history; say which commit they are of in RAINFUSION_COMMIT"
    return f"it was made of code that no commit has ({commit}); commit it first" if commit.endswith("-dirty") else ""


def staleness(record: Record, revision: int | None) -> str:
    """Why a record is out of date, in the light of the backend's revision today; empty where it is not."""
    if revision is None:
        return f"backend {record.suite['backend']!r} is not announced here, so nobody can say whether it still holds"
    if record.suite["revision"] != revision:
        return f"it was made at revision {record.suite['revision']} of the backend, which is at {revision}"
    if record.kit != KIT_REVISION:
        return f"it was made at revision {record.kit} of the conformance kit, which is at {KIT_REVISION}"
    return ""


def _plain(value: Any) -> Any:
    if value is None or value == ANY:
        return None
    return sorted(tuple(x) if isinstance(x, list | tuple) else x for x in value)


def words(value: Any) -> str:
    """Claimed dtypes, blocks or head dims as people read them."""
    plain = _plain(value)
    return ANY if plain is None else ", ".join("x".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in plain)
