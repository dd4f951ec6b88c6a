"""Matrix: the targets and records of one folder, what each cell says, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from hw_matrix.targets import ANY, CONTRACT, EMULATED, HARDWARE, Chip, MatrixError, Target, read_targets
from rainfusion.core.errors import BackendError
from rainfusion.plugins.manager import host
from rainfusion.testing.cases import builtin_cases
from rainfusion.testing.report import KIT_REVISION, Report, ReportError, read_report

BAD = ("failed", "error")


class Status(Enum):
    """What is known of a target in a dtype: symbol, words, meaning."""

    FAILS = ("❌", "fails", "the kit found an error")
    OUT_OF_DATE = ("⌛", "out of date", "the backend or the kit has changed since")
    VERIFIED = ("✅", "verified", "the conformance kit passed on this hardware")
    EMULATED = ("🟡", "emulated", "it passed on an interpreter or a stand-in, which is named")
    CONTRACT = (
        "🔷",
        "contract checked",
        "a stand-in, which is named, checked every call; the vendor's kernels did not run",
    )
    NOT_RUN = ("⬜", "not run", "meant to run there, and not shown yet")
    UNSUPPORTED = ("➖", "unsupported", "refused, for the reason given below")  # noqa: RUF001

    @property
    def symbol(self) -> str:
        """The sign it has in the table."""
        return self.value[0]


_PASSED = {HARDWARE: Status.VERIFIED, EMULATED: Status.EMULATED, CONTRACT: Status.CONTRACT}


@dataclass(frozen=True)
class Cell:
    """What the table says of a target in a dtype; `remarks`: what limits the sign, in words."""

    status: Status
    remarks: str = ""


@dataclass(frozen=True)
class Matrix:
    """Everything in the folder."""

    folder: Path
    chips: Mapping[str, Chip]
    targets: Mapping[str, Target]
    records: Mapping[str, Report]

    @property
    def page(self) -> Path:
        """The file the table is written to."""
        return self.folder / "MATRIX.md"

    @cached_property
    def cases(self) -> dict[str, str]:
        """The dtype of each of today's shared cases."""
        return {case.name: case.problem.dtype for case in builtin_cases()}

    def cell(self, target: Target, dtype: str) -> Cell:
        """What is known. A record of the target itself comes first, then that of its stand-in."""
        if target.why_not(dtype):
            return Cell(Status.UNSUPPORTED)
        for name in (target.name, target.stand_in):
            if name in self.records:
                return self._judge(name, dtype)
        return Cell(Status.NOT_RUN)

    def _judge(self, name: str, dtype: str) -> Cell:
        record, chip = self.records[name], self.targets[name].chip
        by = "" if chip.evidence == HARDWARE else chip.name
        if out_of_date(record):
            return Cell(Status.OUT_OF_DATE, by)
        about = [result for result in record.results if result.dtype in (dtype, "")]
        if any(result.outcome in BAD for result in about):
            return Cell(Status.FAILS, by)
        if not any(result.outcome == "passed" and result.dtype == dtype for result in about):
            return Cell(Status.NOT_RUN)
        known = sum(result.outcome == "xfailed" for result in about)
        shared = {case for case, its_dtype in self.cases.items() if its_dtype == dtype}
        seen = shared & {result.observation.case for result in about if result.observation}
        few = "" if seen == shared else f"{len(seen)} of {len(shared)} cases"
        return Cell(_PASSED[chip.evidence], ", ".join(filter(None, (by, f"{known} known failures" * bool(known), few))))

    def problems(self) -> list[str]:
        """Everything that is wrong with the records, with what to do; empty where they can be relied on."""
        return [problem for name, record in self.records.items() for problem in self._about(name, record)]

    def _about(self, name: str, record: Report) -> Iterator[str]:
        file, again = f"results/{name}.json", f"record it again (python -m hw_matrix record {name})"
        for misfit in misfits(record, self.targets[name]):
            yield f"{file} does not fit its target: {misfit}"
        if said := out_of_date(record):
            yield f"{file} is out of date: {said}; {again} or delete it, and the table says so"
        if said := untraceable(record):
            yield f"{file} cannot be traced: {said}, then {again} or delete it"
        failed = [result.test for result in record.results if result.outcome in BAD]
        if failed:
            yield (
                f"{file} has {len(failed)} failures, the first is {failed[0]}; fix them, or mark them as expected in "
                f"test_kit.py with reason and issue, then {again}"
            )


def read_matrix(folder: Path) -> Matrix:
    """Read a folder of targets and records.

    Raises:
        MatrixError: something in it is malformed, or a record is of no target.
    """
    chips, targets = read_targets(folder / "targets.toml")
    try:
        records = {path.stem: read_report(path) for path in sorted((folder / "results").glob("*.json"))}
    except ReportError as error:
        raise MatrixError(str(error)) from error
    strays = [name for name in records if name not in targets]
    if strays:
        raise MatrixError(
            f"results/{strays[0]}.json is of no target; list it in targets.toml, or name it <backend>-<chip>.json"
        )
    return Matrix(folder, chips, targets, records)


def misfits(record: Report, target: Target) -> Iterator[str]:
    """Why a record is none of that target: another backend, device, machine, or other claims."""
    seen, chip = record.target, target.chip
    if seen["backend"] != target.backend:
        yield f"it is of backend {seen['backend']!r}"
    if seen["device"].partition(":")[0] != target.device:
        yield f"it ran on {seen['device']!r}, the target is a {target.device!r} device"
    name = record.environment["cpu"] if target.device == "cpu" else seen["device_name"]
    if chip.evidence == HARDWARE and not chip.is_called(name):
        yield f"the machine calls itself {name!r}, which is not like {' or '.join(map(repr, chip.recognise))}"
    if bool(seen["stand_in"]) != (chip.evidence != HARDWARE):
        was = f"imitated by {seen['stand_in']}" if seen["stand_in"] else "not imitated"
        yield f"the device was {was}, but {chip.key} is {chip.evidence}"
    for name, ours in (("dtypes", target.dtypes), ("blocks", target.blocks), ("head_dims", target.head_dims)):
        if words(ours) != words(seen["capabilities"][name]):
            yield f"it claims {name} {words(seen['capabilities'][name])}, targets.toml says {words(ours)}; correct one"


def untraceable(record: Report) -> str:
    """Why the code that a record was made of cannot be found again; empty where a commit says it."""
    commit = record.environment["commit"]
    if not commit:
        return "it was made of files without their history; say which commit they are of in RAINFUSION_COMMIT"
    return f"it was made of code that no commit has ({commit}); commit it first" if commit.endswith("-dirty") else ""


def out_of_date(record: Report) -> str:
    """Why a record no longer holds, by the revisions of the backend and of the kit today; empty where it does."""
    backend, revision = record.target["backend"], record.target["revision"]
    try:
        today = host().announced(backend).spec.revision
    except BackendError:
        return f"backend {backend!r} is not announced here, so its revision is not known"
    if revision != today:
        return f"it was made at revision {revision} of the backend, which is at {today}"
    if record.kit != KIT_REVISION:
        return f"it was made at revision {record.kit} of the conformance kit, which is at {KIT_REVISION}"
    return ""


def words(value: Any) -> str:
    """Claimed dtypes, blocks or head dims as people read them, in one order."""
    if value in (None, ANY):
        return ANY
    plain = sorted(tuple(x) if isinstance(x, list | tuple) else x for x in value)
    return ", ".join("x".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in plain)
