"""The table as a page of Markdown: where it runs, on what evidence, how fast, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hw_matrix.matrix import BAD, Matrix, Status, words
from hw_matrix.targets import HARDWARE, Chip, Target
from rainfusion.core.problem import DTYPES
from rainfusion.testing.report import Report

_HEAD = """\
# Hardware matrix

<!-- Written by `python -m hw_matrix build` from targets.toml and results/; edit those. -->

What runs where, and on what evidence. A sign stands only for what a record in `hw_matrix/results` shows: missing
evidence is never reported as a pass.

"""


def page(matrix: Matrix) -> str:
    """The whole page."""
    makers = (_signs, _overview, _evidence, _speed, _takes, _reasons, _chips)
    sections = [list(section(matrix)) for section in makers]
    return _HEAD + "\n".join("\n".join(section) + "\n" for section in sections if section)


def summary(matrix: Matrix, target: Target) -> str:
    """All dtypes of a target in one cell: ``✅ f32 bf16 · ➖ f64``, with what limits the sign."""
    if isinstance(target.unsupported, str):
        return Status.UNSUPPORTED.symbol
    groups: dict[tuple[Status, str], list[str]] = {}
    for dtype, short in DTYPES.items():
        cell = matrix.cell(target, dtype)
        groups.setdefault((cell.status, cell.remarks), []).append(short)
    ranked = sorted(groups.items(), key=lambda group: list(Status).index(group[0][0]))
    said = [f"{status.symbol} {' '.join(dtypes)}{f' ({by})' * bool(by)}" for (status, by), dtypes in ranked]
    return " · ".join(said)


def _signs(matrix: Matrix) -> Iterator[str]:
    yield from _table(("sign", "", "meaning"), [status.value for status in Status])


def _overview(matrix: Matrix) -> Iterator[str]:
    yield "## Where it runs\n"
    rows, backends = [], dict.fromkeys(target.backend for target in matrix.targets.values())
    for chip in matrix.chips.values():
        of_chip = {target.backend: target for target in matrix.targets.values() if target.chip is chip}
        if of_chip and chip.evidence == HARDWARE:
            cells = [summary(matrix, of_chip[b]) if b in of_chip else "" for b in backends]
            rows.append((chip.title, chip.architecture, *cells))
    yield from _table(("hardware", "architecture", *(f"`{backend}`" for backend in backends)), rows)
    yield "\nAn empty cell: the backend does not lower to that hardware. f64, f32, f16, bf16 are dtypes of q, k and v."
    yield "A number of cases: the record lacks some of today's."


def _evidence(matrix: Matrix) -> Iterator[str]:
    yield "## On what evidence\n"
    rows = [
        (f"`{name}`", *_machine(record), *_outcomes(record, matrix), record.environment["date"][:10])
        for name, record in matrix.records.items()
    ]
    heads = ("record", "device", "runtime", "commit", "cases", "passed", "known failures", "worst error")
    yield from _table((*heads, "2³¹ elements", "date"), rows)
    yield (
        f"\n`cases`: taken up, of the {len(matrix.cases)} shared ones of today; what a backend does not claim is left "
        "out. `worst error`: as a share of what is allowed. `2³¹ elements`: `--huge`, only on accelerators."
    )


def _machine(record: Report) -> tuple[str, str, str]:
    environment, target = record.environment, record.target
    device = environment["cpu"] if target["device"] == "cpu" else target["device_name"]
    stand_in = f", imitated by {target['stand_in']}" if target["stand_in"] else ""
    runtimes = {"reference": ["numpy"], "triton": ["triton", "torch"], "torch_npu": ["torch-npu", "torch"]}
    names = runtimes.get(target["backend"], [target["backend"]])
    versions = [f"{name} {environment[name]}" for name in names if environment.get(name)]
    return (
        f"{device}{stand_in}",
        ", ".join([*versions, f"Python {environment['python']}"]),
        f"`{environment['commit']}`",
    )


def _outcomes(record: Report, matrix: Matrix) -> tuple[str, ...]:
    ranks = ("passed", "xfailed", *BAD)
    worst: dict[str, str] = {}
    for result in record.results:
        if result.observation and result.observation.case in matrix.cases and result.outcome in ranks:
            case = result.observation.case
            worst[case] = max(worst.get(case, result.outcome), result.outcome, key=ranks.index)
    outcomes = [*worst.values()]
    passed = [result.observation for result in record.results if result.observation and result.outcome == "passed"]
    share = max((x.error / x.allowed for x in passed if x.error is not None and x.allowed), default=0.0)
    huge = {result.outcome for result in record.results if result.test.startswith("test_huge")}
    said = "**failed**" if huge & {*BAD} else "passed" if huge == {"passed"} else "not run"
    counts = (f"{len(outcomes)} of {len(matrix.cases)}", str(outcomes.count("passed")), str(outcomes.count("xfailed")))
    return *counts, f"{share:.2f}", said


def _speed(matrix: Matrix) -> Iterator[str]:
    rows = [
        (f"`{name}`", entry["problem"], entry["dtype"], f"{entry['ratio']:.2f}", entry["baseline"])
        for name, record in matrix.records.items()
        for entry in record.benchmark.get("ratios", ())
    ]
    if rows:
        yield "## Speed\n"
        yield "Speed of the whole call against dense attention on the same device in the same run; above 1 is faster.\n"
        yield from _table(("record", "problem", "dtype", "ratio", "baseline"), rows)


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
        (f"`{name}`", f"`{result.test}`", result.reason)
        for name, record in matrix.records.items()
        for result in record.results
        if result.outcome == "xfailed"
    ]
    yield from _table(("record", "test", "reason"), known) if known else ["None."]
    yield "\n## Not run\n"
    yield "One command on the hardware fills in a row (`hw_matrix/README.md`):\n"
    for name, target in matrix.targets.items():
        if name not in matrix.records and not isinstance(target.unsupported, str):
            yield f"- {target.chip.title}, {target.runtime}: `python -m hw_matrix record {name}`"


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
