"""Matrix: targets, records and known failures of one folder, and what each cell says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rainfusion.core.errors import BackendError
from rainfusion.core.problem import DTYPES
from rainfusion.matrix.records import BAD, Record, read_record, staleness
from rainfusion.matrix.targets import CONTRACT, EMULATED, HARDWARE, Chip, MatrixError, Target, read_targets
from rainfusion.plugins.conformance.cases import builtin_cases
from rainfusion.plugins.conformance.xfails import Xfail, read_xfails
from rainfusion.plugins.manager import host


class Status(Enum):
    """What is known of a target in a dtype: symbol and words."""

    FAILS = ("❌", "fails")
    OUT_OF_DATE = ("⌛", "out of date")
    VERIFIED = ("✅", "verified")
    EMULATED = ("🟡", "emulated")
    CONTRACT = ("🔷", "contract checked")
    NOT_RUN = ("⬜", "not run")
    UNSUPPORTED = ("➖", "unsupported")  # noqa: RUF001

    @property
    def symbol(self) -> str:
        """The sign it has in the table."""
        return self.value[0]

    @property
    def words(self) -> str:
        """What the sign means."""
        return self.value[1]


_PASSED = {HARDWARE: Status.VERIFIED, EMULATED: Status.EMULATED, CONTRACT: Status.CONTRACT}


@dataclass(frozen=True)
class Cell:
    """What the table says of a target in a dtype.

    Attributes:
        by: what stood in for the hardware; empty for the real thing.
        known_failures: tests that are expected to fail.
        cases: shared cases of the dtype that the record has looked at, where it lacks some of today's.
    """

    status: Status
    by: str = ""
    known_failures: int = 0
    cases: str = ""

    @property
    def remarks(self) -> str:
        """What limits the sign, in words; empty where nothing does."""
        known = f"{self.known_failures} known failures" if self.known_failures else ""
        return ", ".join(filter(None, (self.by, known, self.cases)))


@dataclass(frozen=True)
class Matrix:
    """Everything in the folder; revisions are those of the backends' announcements, None where nobody announces it."""

    folder: Path
    chips: Mapping[str, Chip]
    targets: Mapping[str, Target]
    records: Mapping[str, Record]
    xfails: Mapping[str, tuple[Xfail, ...]]
    revisions: Mapping[str, int | None]

    @property
    def page(self) -> Path:
        """The file the table is written to."""
        return self.folder / "MATRIX.md"

    @property
    def backends(self) -> list[str]:
        """Backends in the order in which targets first name them."""
        return list(dict.fromkeys(target.backend for target in self.targets.values()))

    def cell(self, target: Target, dtype: str) -> Cell:
        """What is known. A record of the target itself comes first, then that of its stand-in."""
        if target.why_not(dtype):
            return Cell(Status.UNSUPPORTED)
        for name in (target.name, target.stand_in):
            if name in self.records:
                return self._judge(self.records[name], dtype)
        return Cell(Status.NOT_RUN)

    def staleness(self, record: Record) -> str:
        """Why a record is out of date, in the light of the code here; empty where it is not."""
        return staleness(record, self.revisions[self.targets[record.name].backend])

    def _judge(self, record: Record, dtype: str) -> Cell:
        chip = self.targets[record.name].chip
        by = "" if chip.evidence == HARDWARE else chip.name
        if self.staleness(record):
            return Cell(Status.OUT_OF_DATE, by)
        tests = record.about(dtype)
        if any(test["outcome"] in BAD for test in tests):
            return Cell(Status.FAILS, by)
        if not any(test["outcome"] == "passed" and test.get("dtype") == dtype for test in tests):
            return Cell(Status.NOT_RUN)
        known = sum(test["outcome"] == "xfailed" for test in tests)
        return Cell(_PASSED[chip.evidence], by, known, _coverage(tests, dtype))

    def cells(self, target: Target) -> dict[str, Cell]:
        """What is known in every dtype."""
        return {dtype: self.cell(target, dtype) for dtype in DTYPES}


def _coverage(tests: Sequence[Mapping[str, Any]], dtype: str) -> str:
    shared = {case.name for case in builtin_cases() if case.problem.dtype == dtype}
    seen = shared & {test.get("case") for test in tests}
    return "" if seen == shared else f"{len(seen)} of {len(shared)} cases"


def read_matrix(folder: Path) -> Matrix:
    """Read a folder of targets, results and known failures.

    Raises:
        MatrixError: something in it is malformed, or a record is of no target.
    """
    chips, targets = read_targets(folder / "targets.toml")
    records = {path.stem: read_record(path) for path in sorted((folder / "results").glob("*.json"))}
    strays = [name for name in records if name not in targets]
    if strays:
        raise MatrixError(
            f"results/{strays[0]}.json is of no target; list it in targets.toml, or name it <backend>-<chip>.json"
        )
    backends = {target.backend for target in targets.values()}
    return Matrix(
        folder=folder,
        chips=chips,
        targets=targets,
        records=records,
        xfails={path.stem: _known(path) for path in sorted((folder / "xfails").glob("*.toml"))},
        revisions={backend: _revision(backend) for backend in backends},
    )


def _known(path: Path) -> tuple[Xfail, ...]:
    try:
        return read_xfails(path)
    except (OSError, ValueError) as error:
        raise MatrixError(str(error)) from error


def _revision(backend: str) -> int | None:
    try:
        return host().announced(backend).spec.revision
    except BackendError:
        return None
