"""The hardware matrix: what a cell says, what the check complains of, what is malformed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rainfusion
from rainfusion.core.problem import DTYPES
from rainfusion.matrix.check import complaints
from rainfusion.matrix.matrix import Matrix, Status, read_matrix
from rainfusion.matrix.page import page, summary
from rainfusion.matrix.targets import MatrixError, read_targets

TARGETS = """
[chips.card]
vendor = "Acme"
name = "Card"
architecture = "A1"
recognise = ["Acme Card*"]
tflops = { bfloat16 = 100 }
bandwidth = 2.0
source = "Acme data sheet"

[chips.interpreter]
name = "Acme's interpreter"
architecture = "a CPU"
evidence = "emulated"

[chips.libraries]
name = "stand-in libraries"
architecture = "a CPU"
evidence = "contract"

[chips.toaster]
vendor = "Other"
name = "Toaster"
architecture = "none"

[[target]]
backend = "acme"
chip = "card"
device = "acme"
runtime = "Acme 1"
dtypes = ["float32", "bfloat16", "float16"]
unsupported = { float64 = "the card has none" }
stand_in = "acme-interpreter"

[[target]]
backend = "acme"
chip = "interpreter"
device = "acme"
runtime = "Acme 1"
dtypes = ["float32", "bfloat16", "float16"]
unsupported = { float64 = "the card has none" }

[[target]]
backend = "acme"
chip = "libraries"
device = "acme"
runtime = "Acme 1"
dtypes = ["float32", "bfloat16", "float16"]
unsupported = { float64 = "the card has none" }

[[target]]
backend = "acme"
chip = "toaster"
unsupported = "it has no memory"
"""
XFAIL = '[[xfail]]\ntest = "test_attend[video-f16]"\nreason = "coarse"\nissue = "acme#7"\n'


@pytest.fixture(autouse=True)
def acme() -> Any:
    rainfusion.register(rainfusion.BackendSpec("acme", "acme:Backend", revision=3))
    yield
    rainfusion.unregister("acme")


def a_record(stand_in: str = "", **outcomes: str) -> dict[str, Any]:
    """A record in which every dtype passed, unless its outcome is given."""
    tests = [
        {
            "outcome": outcomes.get(short, "passed"),
            "test": f"test_attend[video-{short}]",
            "case": f"video-{short}",
            "dtype": dtype,
            "absolute": 1.0,
            "tolerance": 4.0,
            "reason": "coarse (acme#7)",
        }
        for dtype, short in DTYPES.items()
        if dtype != "float64"
    ]
    tests.append({"outcome": outcomes.get("contract", "passed"), "test": "test_contract_claims"})
    tests.append({"outcome": outcomes.get("huge", "skipped"), "test": "test_huge[bhsd]"})
    claims = {"dtypes": ["bfloat16", "float16", "float32"], "blocks": None, "head_dims": None}
    suite = {"backend": "acme", "revision": 3, "device": "acme:0", "device_name": "Acme Card 80", "stand_in": stand_in}
    return {
        "rainfusion_report": 2,
        "kit": 1,
        "environment": {"commit": "abc", "date": "2026-01-02T03:04", "cpu": "Acme CPU", "python": "3.11"},
        "suites": [{**suite, "capabilities": claims, "outcomes": {}, "tests": tests}],
        "benchmark": {"ratios": [{"problem": "8 tokens", "dtype": "float32", "baseline": "dense", "ratio": 3.14}]},
    }


Read = Callable[..., Matrix]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read a folder with these records, its table freshly written."""

    def made(xfails: str = "", **records: dict[str, Any]) -> Matrix:
        (tmp_path / "targets.toml").write_text(TARGETS)
        for folder in ("results", "xfails"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for name, record in records.items():
            (tmp_path / "results" / f"{name.replace('_', '-')}.json").write_text(json.dumps(record))
        if xfails:
            (tmp_path / "xfails" / "acme.toml").write_text(xfails)
        matrix = read_matrix(tmp_path)
        matrix.page.write_text(page(matrix), encoding="utf-8")
        return matrix

    return made


def statuses(matrix: Matrix, target: str = "acme-card") -> list[Status]:
    return [matrix.cell(matrix.targets[target], dtype).status for dtype in ("float64", "float32", "bfloat16")]


# -- cells -----------------------------------------------------------------------------------------


def test_no_evidence_is_not_green(read: Read) -> None:
    matrix = read()
    assert statuses(matrix) == [Status.UNSUPPORTED, Status.NOT_RUN, Status.NOT_RUN]
    assert complaints(matrix) == []
    assert "✅ " not in "".join(line for line in page(matrix).splitlines() if "Card" in line)
    assert "`python -m rainfusion.matrix.record acme-card`" in page(matrix)


def test_a_record_of_the_hardware_verifies(read: Read) -> None:
    matrix = read(acme_card=a_record())
    assert statuses(matrix) == [Status.UNSUPPORTED, Status.VERIFIED, Status.VERIFIED]
    assert complaints(matrix) == []
    assert summary(matrix, matrix.targets["acme-card"]) == "✅ f16 bf16 f32 (1 of 64 cases) · ➖ f64"  # noqa: RUF001
    assert "| `acme-card` | 8 tokens | float32 | 3.14 | dense |" in page(matrix)
    assert "| 0.25 | not run | 2026-01-02, `abc` |" in page(matrix)


def test_a_stand_in_counts_for_less_and_is_named(read: Read) -> None:
    matrix = read(acme_interpreter=a_record("an interpreter"))
    assert statuses(matrix) == [Status.UNSUPPORTED, Status.EMULATED, Status.EMULATED]
    assert matrix.cell(matrix.targets["acme-card"], "float32").remarks == "Acme's interpreter, 1 of 64 cases"
    assert statuses(matrix, "acme-libraries")[1] is Status.NOT_RUN
    assert complaints(matrix) == []
    assert statuses(read(acme_libraries=a_record("libraries")), "acme-libraries")[1] is Status.CONTRACT
    assert statuses(read(acme_card=a_record()))[1] is Status.VERIFIED


def test_what_failed_is_not_green_in_its_dtype(read: Read) -> None:
    matrix = read(acme_card=a_record(bf16="failed"))
    assert statuses(matrix)[1:] == [Status.VERIFIED, Status.FAILS]
    assert "1 failures, the first is test_attend[video-bf16]; mend them, or list them in xfails/acme.toml" in str(
        complaints(matrix)
    )


def test_a_failure_of_no_dtype_is_one_of_all(read: Read) -> None:
    assert statuses(read(acme_card=a_record(contract="error")))[1:] == [Status.FAILS, Status.FAILS]


def test_skips_alone_are_not_green(read: Read) -> None:
    assert statuses(read(acme_card=a_record(bf16="skipped")))[1:] == [Status.VERIFIED, Status.NOT_RUN]


def test_known_failures_are_counted_and_listed(read: Read) -> None:
    matrix = read(XFAIL, acme_card=a_record(f16="xfailed"))
    assert matrix.cell(matrix.targets["acme-card"], "float16").status is Status.NOT_RUN
    assert matrix.cell(matrix.targets["acme-card"], "float32").status is Status.VERIFIED
    assert complaints(matrix) == []
    assert "| `acme` | `test_attend[video-f16]` | * | coarse | acme#7 |" in page(matrix)


def test_two_billion_elements_are_a_column(read: Read) -> None:
    assert "| 0.25 | passed | 2026-01-02" in page(read(acme_card=a_record(huge="passed")))


# -- complaints ------------------------------------------------------------------------------------


def changed(**changes: Any) -> dict[str, Any]:
    record = a_record()
    for key, value in changes.items():
        of = record["environment"] if key in record["environment"] else record["suites"][0]
        (record if key in record else of)[key] = value
    return record


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (changed(revision=2), "out of date: it was made at revision 2 of the backend, which is at 3; record it again"),
        (changed(kit=0), "out of date: it was made at revision 0 of the conformance kit"),
        (changed(commit="abc-dirty"), "made of code that no commit has (abc-dirty)"),
        (changed(commit=None), "say which commit they are of in RAINFUSION_COMMIT"),
        (changed(backend="other"), "it is of backend 'other'"),
        (changed(device="cpu"), "it ran on 'cpu', the target is a 'acme' device"),
        (changed(device_name="Other Card"), "calls itself 'Other Card', which is not like 'Acme Card*'"),
        (changed(stand_in="an interpreter"), "imitated by an interpreter, but card is hardware"),
        (
            changed(capabilities={"dtypes": ["float16"], "blocks": [[128, 128]], "head_dims": None}),
            "it claims blocks 128x128, targets.toml says any; correct one of them",
        ),
    ],
)
def test_a_record_that_is_not_to_be_believed(read: Read, record: dict[str, Any], said: str) -> None:
    assert said in " ".join(complaints(read(acme_card=record)))


def test_an_older_record_is_shown_as_out_of_date(read: Read) -> None:
    assert statuses(read(acme_card=changed(revision=2)))[1] is Status.OUT_OF_DATE


def test_a_stand_in_that_nothing_imitated(read: Read) -> None:
    said = str(complaints(read(acme_interpreter=a_record())))
    assert "the device was not imitated, but interpreter is emulated" in said


def test_a_stale_table_and_a_stale_known_failure(read: Read) -> None:
    matrix = read(XFAIL, acme_card=a_record())
    matrix.page.write_text("something else", encoding="utf-8")
    known, table = complaints(matrix)
    assert "no record shows the known failure 'test_attend[video-f16]'; remove the stale entry" in known
    assert "MATRIX.md is not what the records say; run rainfusion matrix" in table


# -- malformed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bandwidth", "speed", "chip card: speed is not known"),
        ('source = "Acme data sheet"', "", "chip card has figures without a source"),
        ('evidence = "contract"', 'evidence = "hope"', "chip libraries has evidence 'hope'"),
        ('name = "Toaster"', "", "chip toaster lacks name"),
        ('chip = "toaster"', 'chip = "kettle"', "target acme-kettle names no chip"),
        ('chip = "toaster"', 'chip = "card"', "target acme-card is listed twice"),
        ('float64 = "the card has none"', "", "float64 must be either in dtypes or, with a reason, in unsupported"),
        ('"bfloat16", ', '"bfloat17", ', "bfloat17 is not known"),
        ('stand_in = "acme-interpreter"', 'stand_in = "acme-toaster"', "'acme-toaster' is no stand-in for acme"),
        ('runtime = "Acme 1"', "", "target acme-card lacks runtime"),
        ("[chips.card]", "[chips.card", "is not TOML"),
    ],
)
def test_malformed_targets_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "targets.toml").write_text(TARGETS.replace(old, new))
    with pytest.raises(MatrixError) as refusal:
        read_targets(tmp_path / "targets.toml")
    assert said in str(refusal.value)


def test_malformed_records_and_strays_are_refused(read: Read) -> None:
    with pytest.raises(MatrixError, match=r"acme-card\.json is not a record"):
        read(acme_card={"rainfusion_report": 2})
    with pytest.raises(MatrixError, match="has format 1; record it again"):
        read(acme_card={"rainfusion_report": 1})


def test_a_record_of_no_target_is_refused(read: Read) -> None:
    with pytest.raises(MatrixError, match=r"results/acme-kettle\.json is of no target; list it in targets.toml"):
        read(acme_kettle=a_record())


def test_malformed_known_failures_are_refused(read: Read) -> None:
    with pytest.raises(MatrixError, match="needs issue, reason, test"):
        read('[[xfail]]\ntest = "x"\n')
