"""What is wrong with the matrix, and what to do about it: what ``rainfusion matrix --check`` says."""

from __future__ import annotations

from collections.abc import Iterator

from rainfusion.matrix.matrix import Matrix
from rainfusion.matrix.page import page
from rainfusion.matrix.records import BAD, Record, misfits, untraceable


def complaints(matrix: Matrix) -> list[str]:
    """Everything that is wrong; empty where the table may be believed."""
    found = [complaint for record in matrix.records.values() for complaint in _about(record, matrix)]
    found += _about_known_failures(matrix)
    written = matrix.page.read_text(encoding="utf-8") if matrix.page.exists() else ""
    if written != page(matrix):
        found.append(f"{matrix.page.name} is not what the records say; run rainfusion matrix and commit the file")
    return found


def _about(record: Record, matrix: Matrix) -> Iterator[str]:
    file = f"results/{record.name}.json"
    again = f"record it again (python -m rainfusion.matrix.record {record.name}) or delete it"
    for misfit in misfits(record, matrix.targets[record.name]):
        yield f"{file} does not fit its target: {misfit}"
    stale = matrix.staleness(record)
    if stale:
        yield f"{file} is out of date: {stale}; {again}, and the table says so"
    unknown = untraceable(record)
    if unknown:
        yield f"{file} cannot be traced: {unknown}, then {again}"
    failed = [test["test"] for test in record.tests if test["outcome"] in BAD]
    if failed:
        yield (
            f"{file} has {len(failed)} failures, the first is {failed[0]}; mend them, or list them in "
            f"xfails/{record.suite['backend']}.toml with reason and issue, then {again}"
        )


def _about_known_failures(matrix: Matrix) -> Iterator[str]:
    for backend, xfails in matrix.xfails.items():
        reasons = {
            test["reason"]
            for record in matrix.records.values()
            if record.suite["backend"] == backend
            for test in record.tests
            if test["outcome"] == "xfailed"
        }
        for xfail in xfails:
            if xfail.said not in reasons:
                yield (
                    f"xfails/{backend}.toml: no record shows the known failure {xfail.test!r}; "
                    "remove the stale entry, or record again with it"
                )
