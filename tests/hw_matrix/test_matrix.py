"""The hardware matrix: what a cell says, what is wrong with it, what is malformed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rainfusion
from hw_matrix.__main__ import main
from hw_matrix.matrix import Matrix, Status, read_matrix
from hw_matrix.page import page, summary
from hw_matrix.targets import MatrixError, read_targets
from rainfusion.core.problem import DTYPES
from rainfusion.testing.report import KIT_REVISION

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


@pytest.fixture(autouse=True)
def acme() -> Any:
    rainfusion.register(rainfusion.BackendSpec("acme", "acme:Backend", revision=3))
    yield
    rainfusion.unregister("acme")


def a_record(stand_in: str = "", **outcomes: str) -> dict[str, Any]:
    """A record in which every dtype passed, unless its outcome is given."""
    tests: list[dict[str, Any]] = [
        {
            "outcome": outcomes.get(short, "passed"),
            "test": f"test_attend[video-{short}]",
            "reason": "coarse (acme#7)",
            "observation": {
                "level": "attend",
                "case": f"video-{short}",
                "dtype": dtype,
                "error": 1.0,
                "allowed": 4.0,
            },
        }
        for dtype, short in DTYPES.items()
        if dtype != "float64"
    ]
    tests.append({"outcome": outcomes.get("contract", "passed"), "test": "test_contract_claims"})
    tests.append({"outcome": outcomes.get("huge", "skipped"), "test": "test_huge[bhsd]"})
    claims = {"dtypes": ["bfloat16", "float16", "float32"], "blocks": None, "head_dims": None}
    target = {"backend": "acme", "revision": 3, "device": "acme:0", "device_name": "Acme Card 80", "stand_in": stand_in}
    return {
        "rainfusion_report": 3,
        "kit": KIT_REVISION,
        "environment": {"commit": "abc", "date": "2026-01-02T03:04", "cpu": "Acme CPU", "python": "3.11"},
        "target": {**target, "capabilities": claims},
        "tests": tests,
        "benchmark": {"ratios": [{"problem": "8 tokens", "dtype": "float32", "baseline": "dense", "ratio": 3.14}]},
    }


Read = Callable[..., Matrix]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read a folder with these records, its table freshly written."""

    def written(**records: dict[str, Any]) -> Matrix:
        (tmp_path / "targets.toml").write_text(TARGETS)
        (tmp_path / "results").mkdir(exist_ok=True)
        for name, record in records.items():
            (tmp_path / "results" / f"{name.replace('_', '-')}.json").write_text(json.dumps(record))
        matrix = read_matrix(tmp_path)
        matrix.page.write_text(page(matrix), encoding="utf-8")
        return matrix

    return written


def statuses(matrix: Matrix, target: str = "acme-card") -> list[Status]:
    return [matrix.cell(matrix.targets[target], dtype).status for dtype in ("float64", "float32", "bfloat16")]


# -- cells -----------------------------------------------------------------------------------------


def test_no_evidence_is_not_green(read: Read) -> None:
    matrix = read()
    assert statuses(matrix) == [Status.UNSUPPORTED, Status.NOT_RUN, Status.NOT_RUN]
    assert matrix.problems() == []
    assert "✅ " not in "".join(line for line in page(matrix).splitlines() if "Card" in line)
    assert "`python -m hw_matrix record acme-card`" in page(matrix)


def test_a_record_of_the_hardware_verifies(read: Read) -> None:
    matrix = read(acme_card=a_record())
    few = len(matrix.cases) // len(DTYPES)
    assert statuses(matrix) == [Status.UNSUPPORTED, Status.VERIFIED, Status.VERIFIED]
    assert matrix.problems() == []
    assert summary(matrix, matrix.targets["acme-card"]) == f"✅ f16 bf16 f32 (1 of {few} cases) · ➖ f64"  # noqa: RUF001
    assert "| `acme-card` | 8 tokens | float32 | 3.14 | dense |" in page(matrix)
    assert "| 0.25 | not run | 2026-01-02 |" in page(matrix)
    assert "| `abc` |" in page(matrix)


def test_a_stand_in_counts_for_less_and_is_named(read: Read) -> None:
    matrix = read(acme_interpreter=a_record("an interpreter"))
    few = len(matrix.cases) // len(DTYPES)
    assert statuses(matrix) == [Status.UNSUPPORTED, Status.EMULATED, Status.EMULATED]
    assert matrix.cell(matrix.targets["acme-card"], "float32").remarks == f"Acme's interpreter, 1 of {few} cases"
    assert statuses(matrix, "acme-libraries")[1] is Status.NOT_RUN
    assert matrix.problems() == []
    assert statuses(read(acme_libraries=a_record("libraries")), "acme-libraries")[1] is Status.CONTRACT
    assert statuses(read(acme_card=a_record()))[1] is Status.VERIFIED


def test_what_failed_is_not_green_in_its_dtype(read: Read) -> None:
    matrix = read(acme_card=a_record(bf16="failed"))
    assert statuses(matrix)[1:] == [Status.VERIFIED, Status.FAILS]
    assert "1 failures, the first is test_attend[video-bf16]; fix them, or mark them as expected in test_kit.py" in str(
        matrix.problems()
    )


def test_a_failure_of_no_dtype_is_one_of_all(read: Read) -> None:
    assert statuses(read(acme_card=a_record(contract="error")))[1:] == [Status.FAILS, Status.FAILS]


def test_skips_alone_are_not_green(read: Read) -> None:
    assert statuses(read(acme_card=a_record(bf16="skipped")))[1:] == [Status.VERIFIED, Status.NOT_RUN]


def test_expected_failures_are_counted_and_listed(read: Read) -> None:
    matrix = read(acme_card=a_record(f16="xfailed"))
    assert matrix.cell(matrix.targets["acme-card"], "float16").status is Status.NOT_RUN
    assert matrix.cell(matrix.targets["acme-card"], "float32").status is Status.VERIFIED
    assert matrix.problems() == []
    assert "| `acme-card` | `test_attend[video-f16]` | coarse (acme#7) |" in page(matrix)
    record = a_record(f16="xfailed")
    record["tests"].append({**record["tests"][0], "test": "test_select[video-f16]", "outcome": "passed"})
    record["tests"][-1]["observation"] = {"level": "select", "case": "video-f16", "dtype": "float16"}
    assert "1 known failures" in read(acme_card=record).cell(matrix.targets["acme-card"], "float16").remarks


def test_two_billion_elements_are_a_column(read: Read) -> None:
    assert "| 0.25 | passed | 2026-01-02" in page(read(acme_card=a_record(huge="passed")))


# -- problems --------------------------------------------------------------------------------------


def changed(**changes: Any) -> dict[str, Any]:
    record = a_record()
    for key, value in changes.items():
        of = record["environment"] if key in record["environment"] else record["target"]
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
            "it claims blocks 128x128, targets.toml says any; correct one",
        ),
    ],
)
def test_a_record_that_is_not_to_be_believed(read: Read, record: dict[str, Any], said: str) -> None:
    assert said in " ".join(read(acme_card=record).problems())


def test_an_older_record_is_shown_as_out_of_date(read: Read) -> None:
    assert statuses(read(acme_card=changed(revision=2)))[1] is Status.OUT_OF_DATE


def test_a_stand_in_that_nothing_imitated(read: Read) -> None:
    said = str(read(acme_interpreter=a_record()).problems())
    assert "the device was not imitated, but interpreter is emulated" in said


def test_the_table_is_built_and_checked(read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = read(acme_card=a_record())
    matrix.page.write_text("something else", encoding="utf-8")
    assert main(["check", "--folder", str(tmp_path)]) == 1
    assert "MATRIX.md is not what the records say; run python -m hw_matrix build" in capsys.readouterr().out
    assert main(["build", "--folder", str(tmp_path)]) == 0
    assert "wrote" in capsys.readouterr().out
    assert matrix.page.read_text(encoding="utf-8") == page(matrix)
    assert main(["check", "--folder", str(tmp_path)]) == 0
    assert "MATRIX.md is right: 1 records, 4 targets" in capsys.readouterr().out


def test_a_folder_without_targets_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--folder", str(tmp_path)]) == 2
    assert "run in a checkout of rainfusion, or give --folder" in capsys.readouterr().err


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
        ('chip = "toaster"', "chip = [3]", "lacks its names; give backend and chip as text"),
        ('name = "Toaster"', "name = 3", "chip toaster: name = 3 is not text"),
        ('source = "Acme data sheet"', "source = true", "chip card: source = True is not text"),
        ('runtime = "Acme 1"', "runtime = 1.5", "target acme-card: runtime = 1.5 is not text"),
        ('runtime = "Acme 1"', 'runtime = "Acme 1"\nbenchmark = "a.py"', "benchmark = 'a.py' is not a list of texts"),
        ('runtime = "Acme 1"', 'runtime = "Acme 1"\nenviron = { A = 1 }', "environ = {'A': 1} is not a table of texts"),
        (
            'runtime = "Acme 1"',
            'runtime = "Acme 1"\nhead_dims = "some"',
            "head_dims = 'some' is neither 'any' nor a list",
        ),
        ('runtime = "Acme 1"', 'runtime = "Acme 1"\nblocks = [1, [2, 2]]', "blocks = [1, [2, 2]] is neither"),
    ],
)
def test_malformed_targets_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "targets.toml").write_text(TARGETS.replace(old, new))
    with pytest.raises(MatrixError) as refusal:
        read_targets(tmp_path / "targets.toml")
    assert said in str(refusal.value)


@pytest.mark.parametrize("text", ["chips = 3", "target = 3", "target = [3]", "[chips]\ncard = 3", "a = " + "[" * 9999])
def test_targets_of_another_structure_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "targets.toml").write_text(text)
    with pytest.raises(MatrixError):
        read_targets(tmp_path / "targets.toml")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(MatrixError, match="is not a regular file"):
            read_targets(path)


def test_malformed_records_are_refused(read: Read) -> None:
    with pytest.raises(MatrixError, match=r"acme-card\.json is not a report"):
        read(acme_card={"rainfusion_report": 3})
    with pytest.raises(MatrixError, match="format 2; this rainfusion reads 3"):
        read(acme_card={"rainfusion_report": 2})


def test_a_record_of_no_target_is_refused(read: Read) -> None:
    with pytest.raises(MatrixError, match=r"results/acme-kettle\.json is of no target; list it in targets.toml"):
        read(acme_kettle=a_record())
