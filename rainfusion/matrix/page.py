"""The table as a page of Markdown: where it runs, on what evidence, how fast, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rainfusion.core.problem import DTYPES
from rainfusion.matrix.matrix import Matrix, Status
from rainfusion.matrix.records import Record, words
from rainfusion.matrix.targets import HARDWARE, Chip, Target
from rainfusion.plugins.conformance.cases import builtin_cases

_HEAD = """\
# Hardware matrix

<!-- Written by `rainfusion matrix` from targets.toml, results/ and xfails/; edit those. -->

What runs where, and on what evidence. A sign stands only for what a record in `hw_matrix/results` shows:
no evidence is never green.

"""

_MEANINGS = {
    Status.VERIFIED: "the conformance kit passed on this hardware",
    Status.EMULATED: "it passed on an interpreter or a stand-in, which is named",
    Status.CONTRACT: "a stand-in, which is named, checked every call; the vendor's kernels did not run",
    Status.NOT_RUN: "meant to run there, and nobody has shown it",
    Status.UNSUPPORTED: "refused, for the reason given below",
    Status.OUT_OF_DATE: "the backend has changed since",
    Status.FAILS: "the kit found an error",
}


def page(matrix: Matrix) -> str:
    """The whole page."""
    sections = (
        _signs(),
        _overview(matrix),
        _evidence(matrix),
        _speed(matrix),
        _takes(matrix),
        _reasons(matrix),
        _chips(matrix),
    )
    return _HEAD + "\n".join("\n".join(section) + "\n" for section in map(list, sections) if section)


def summary(matrix: Matrix, target: Target) -> str:
    """All dtypes of a target in one cell: ``✅ f32 bf16 · ➖ f64``, with what limits the sign."""
    if isinstance(target.unsupported, str):
        return Status.UNSUPPORTED.symbol
    groups: dict[tuple[Status, str], list[str]] = {}
    for dtype, cell in matrix.cells(target).items():
        groups.setdefault((cell.status, cell.remarks), []).append(DTYPES[dtype])
    ranked = sorted(groups.items(), key=lambda group: list(Status).index(group[0][0]))
    parts = [
        f"{status.symbol} {' '.join(dtypes)}" + (f" ({said})" if said else "") for (status, said), dtypes in ranked
    ]
    return " · ".join(parts)


def _signs() -> Iterator[str]:
    yield from _table(("sign", "", "meaning"), [(s.symbol, s.words, said) for s, said in _MEANINGS.items()])


def _overview(matrix: Matrix) -> Iterator[str]:
    yield "## Where it runs\n"
    rows = []
    for chip in matrix.chips.values():
        of_chip = {target.backend: target for target in matrix.targets.values() if target.chip is chip}
        if of_chip and chip.evidence == HARDWARE:
            cells = [summary(matrix, of_chip[b]) if b in of_chip else "" for b in matrix.backends]
            rows.append((chip.title, chip.architecture, *cells))
    yield from _table(("hardware", "architecture", *(f"`{backend}`" for backend in matrix.backends)), rows)
    yield "\nAn empty cell: the backend does not lower to that hardware. f64, f32, f16, bf16 are dtypes of q, k and v."
    yield "A number of cases: the record lacks some of today's."


def _evidence(matrix: Matrix) -> Iterator[str]:
    yield "## On what evidence\n"
    names = {case.name for case in builtin_cases()}
    rows = [
        (f"`{name}`", *_machine(record), *_outcomes(record, names), *_made(record))
        for name, record in matrix.records.items()
    ]
    heads = ("record", "device", "runtime", "cases", "passed", "known failures", "worst error", "2³¹ elements", "made")
    yield from _table(heads, rows)
    yield (
        f"\n`cases`: taken up, of the {len(names)} shared ones of today; what a backend does not claim is left out. "
        "`worst error`: as a share of what the tolerance allows. `2³¹ elements`: `--huge`, only on accelerators."
    )


def _machine(record: Record) -> tuple[str, str]:
    environment, suite = record.environment, record.suite
    device = environment["cpu"] if suite["device"] == "cpu" else suite["device_name"]
    stand_in = f", imitated by {suite['stand_in']}" if suite["stand_in"] else ""
    versions = [f"{name} {environment[name]}" for name in _runtime_of(suite["backend"]) if environment.get(name)]
    return f"{device}{stand_in}", ", ".join([*versions, f"Python {environment['python']}"])


def _runtime_of(backend: str) -> Sequence[str]:
    runtimes = {"reference": ["numpy"], "triton": ["triton", "torch"], "torch_npu": ["torch-npu", "torch"]}
    return runtimes.get(backend, [backend])


def _outcomes(record: Record, names: set[str]) -> tuple[str, ...]:
    cases = record.cases()
    shared = [outcome for name, outcome in cases.items() if name in names]
    huge = {"passed": "passed", "failed": "**failed**", "error": "**failed**"}
    return (
        f"{len(shared)} of {len(names)}",
        str(shared.count("passed")),
        str(shared.count("xfailed")),
        f"{record.worst_share():.2f}",
        huge.get(record.outcome("test_huge"), "not run"),
    )


def _made(record: Record) -> tuple[str]:
    return (f"{record.environment['date'][:10]}, `{record.environment['commit']}`",)


def _speed(matrix: Matrix) -> list[str]:
    rows = [
        (f"`{name}`", entry["problem"], entry["dtype"], f"{entry['ratio']:.2f}", entry["baseline"])
        for name, record in matrix.records.items()
        for entry in record.ratios
    ]
    if not rows:
        return []
    told = "Speed of the whole call against dense attention on the same device in the same run; above 1 is faster.\n"
    return ["## Speed\n", told, *_table(("record", "problem", "dtype", "ratio", "baseline"), rows)]


def _takes(matrix: Matrix) -> Iterator[str]:
    yield "## What it takes\n"
    groups: dict[tuple[str, ...], list[str]] = {}
    for target in matrix.targets.values():
        if not isinstance(target.unsupported, str):
            shapes = (words(target.blocks), words(target.head_dims))
            groups.setdefault((f"`{target.backend}`", target.runtime, *shapes), []).append(target.chip.title)
    rows = [(backend, "; ".join(chips), *rest) for (backend, *rest), chips in groups.items()]
    yield from _table(("backend", "hardware", "driver, runtime", "blocks", "head dims"), rows)


def _reasons(matrix: Matrix) -> Iterator[str]:
    yield "## What is not supported, and why\n"
    groups: dict[tuple[str, str, str], list[str]] = {}
    for target in matrix.targets.values():
        reasons: dict[str, list[str]] = {}
        for dtype, short in DTYPES.items():
            if why := target.why_not(dtype):
                reasons.setdefault(why, []).append(short)
        for why, dtypes in reasons.items():
            what = "all" if len(dtypes) == len(DTYPES) else ", ".join(dtypes)
            groups.setdefault((target.backend, what, why), []).append(target.chip.title)
    rows = [(f"`{backend}`", "; ".join(chips), what, why) for (backend, what, why), chips in groups.items()]
    yield from _table(("backend", "hardware", "dtype", "why"), rows)
    yield "\n## Known failures\n"
    known = [
        (f"`{backend}`", f"`{x.test}`", x.device, x.reason, x.issue)
        for backend, xfails in matrix.xfails.items()
        for x in xfails
    ]
    yield from _table(("backend", "test", "device", "reason", "issue"), known) if known else ["None."]
    yield "\n## Not run\n"
    yield "Whoever has the hardware fills in a row with one command (`hw_matrix/README.md`):\n"
    for name, target in matrix.targets.items():
        if name not in matrix.records and not isinstance(target.unsupported, str):
            yield f"- {target.chip.title}, {target.runtime}: `python -m rainfusion.matrix.record {name}`"


def _chips(matrix: Matrix) -> Iterator[str]:
    yield "## The hardware\n"
    yield "Dense peaks in TFLOP/s and memory bandwidth in TB/s, by the vendor's documents.\n"
    rows = [(f"`{chip.key}`", chip.title, chip.architecture, *_figures(chip)) for chip in matrix.chips.values()]
    yield from _table(("chip", "hardware", "architecture", "peak", "bandwidth", "source"), rows)


def _figures(chip: Chip) -> tuple[str, str, str]:
    peaks = ", ".join(f"{DTYPES[dtype]} {peak:g}" for dtype, peak in chip.tflops.items())
    return peaks, "" if chip.bandwidth is None else f"{chip.bandwidth:g}", chip.source


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in row) + " |"
