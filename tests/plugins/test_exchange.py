"""Two saved parity reports: what is shown to agree, what is not, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rainfusion.plugins.conformance import sketch
from rainfusion.plugins.conformance.agreement import Agreement, compare_reports
from rainfusion.plugins.conformance.cases import every_case
from rainfusion.plugins.conformance.exchange import ReportError, read_report, report_of
from rainfusion.plugins.conformance.parity import compare_case
from rainfusion.plugins.conformance.target import find_target

NAMES = ("blocks_of_32-f32", "nan_query-bf16", "poisoned_block_in_a_video-f32", "dense-f64", "given_mask-f16")
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What a machine writes whose backend is right."""
    pair = find_target("reference"), find_target("reference")
    cases = [case for case in every_case() if case.name in NAMES]
    made: dict[str, Any] = json.loads(json.dumps(report_of(pair, cases, [compare_case(*pair, case) for case in cases])))
    return made


@pytest.fixture
def compare(record: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Agreement]]:
    """Compare the record with one in which something is changed."""

    def compared(change: Change) -> dict[str, Agreement]:
        other = json.loads(json.dumps(record))
        change(other)
        for name, content in (("a", record), ("b", other)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        a, b = (read_report(tmp_path / f"{name}.json") for name in "ab")
        return {found.case: found for found in compare_reports(a, b)}

    return compared


def in_case(name: str, **changes: Any) -> Change:
    """Change what is said of one case; a function is given the old value."""

    def change(report: dict[str, Any]) -> None:
        (entry,) = (entry for entry in report["cases"] if entry["case"] == name)
        for key, value in changes.items():
            of = entry if key in entry else entry["evidence"]
            of[key] = value(of[key]) if callable(value) else value

    return change


def test_two_right_backends_agree(compare: Any) -> None:
    found = compare(lambda report: None)
    assert {*found} == {*NAMES}
    assert all(x.ok and x.same_bits and x.bound <= x.allowed and x.rms == 0.0 for x in found.values())
    assert found["blocks_of_32-f32"].mask_agreement == 1.0
    assert found["given_mask-f16"].mask_agreement is None


FEW, GIVEN = "blocks_of_32-f32", "given_mask-f16"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (in_case(FEW, error=1.0), "the second is off the oracle by 1 (at most"),
        (in_case(FEW, error="inf"), "the second is off the oracle by inf"),
        (in_case(FEW, error="nan"), "the second is off the oracle by inf"),
        (in_case(FEW, lse_error=1.0), "the second's log-sum-exp is off by 1"),
        (in_case(FEW, out=lambda sums: [x + 1.0 for x in sums]), "farther from the oracle than its report says"),
        (in_case(FEW, oracle=lambda sums: [x + 1.0 for x in sums]), "the two oracles are"),
        (in_case(FEW, pattern="other"), "NaN or infinity stand elsewhere"),
        (in_case(FEW, selected=None), "only one report has the mask that its backend selects"),
        (in_case(FEW, elements=7), "the outputs are of different sizes"),
        (in_case(FEW, allowed=1.0), "that is not one rule"),
    ],
)
def test_what_is_not_one_answer_disagrees(compare: Any, change: Change, why: str) -> None:
    found = compare(change)[FEW]
    assert found.ok is False
    assert why in found.why


def test_outputs_that_are_apart_while_both_are_near_the_oracle(compare: Any) -> None:
    """An error that the backend admits, and the sketch shows."""
    apart = in_case(FEW, out=lambda sums: [x + 1e-4 for x in sums], error=2e-6, allowed=2e-5)
    found = compare(apart)[FEW]
    assert found.bound > 2e-6
    assert 0 < found.rms < found.bound


def flipped(text: str) -> str:
    import base64

    bits = np.frombuffer(base64.b64decode(text), np.uint8).copy()
    bits[0] ^= 0x80
    return base64.b64encode(bits.tobytes()).decode()


def test_another_choice_of_blocks_disagrees_unless_it_is_open(compare: Any) -> None:
    found = compare(in_case(FEW, selected=flipped))[FEW]
    assert found.ok is False
    assert "1 of " in found.why
    assert "chosen otherwise, and not by near ties" in found.why
    assert compare(in_case(FEW, selected=flipped, undecided=flipped))[FEW].ok


def test_outputs_under_different_masks_are_not_compared(compare: Any) -> None:
    found = compare(in_case(GIVEN, mask=flipped))[GIVEN]
    assert found.ok is None
    assert "different masks" in found.why


def test_what_one_backend_does_not_claim_is_refused(compare: Any) -> None:
    found = compare(lambda report: report["cases"][0].update(refused="acme: no dtype float32"))
    assert [x.why for x in found.values() if x.ok is None] == ["acme: no dtype float32"]


def test_other_inputs_are_refused(compare: Any) -> None:
    with pytest.raises(
        ReportError, match=r"other inputs \(seeds 0 and 3\): 1 of 5 cases differ, the first is given_mask"
    ):
        compare(in_case(GIVEN, inputs="0" * 64, seed=3))


def test_another_kit_and_other_cases_are_refused(compare: Any) -> None:
    with pytest.raises(ReportError, match="revisions 1 and 9 of the conformance kit"):
        compare(lambda report: report.update(kit=9))
    with pytest.raises(ReportError, match="no case in common"):
        compare(lambda report: report["cases"].clear())


def test_hostile_text_is_not_printed(compare: Any, record: dict[str, Any], tmp_path: Path) -> None:
    record = {**record, "backend": {**record["backend"], "device_name": "chip\x1b[2J" + "x" * 9999}}
    (tmp_path / "c.json").write_text(json.dumps(record))
    who = read_report(tmp_path / "c.json").who
    assert "\x1b" not in who
    assert len(who) < 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report.update(rainfusion_parity=99), "format 99; this rainfusion reads 1"),
        (lambda report: report.pop("environment"), "it lacks 'environment'"),
        (lambda report: report.update(cases=[1]), "not a parity report"),
        (in_case(FEW, out=[1.0]), "a sketch is 32 numbers"),
        (in_case(FEW, out=["nan"] * 32), "a sketch is 32 numbers"),
        (in_case(FEW, error=10**400), "not a parity report"),
        (in_case(FEW, pairs=[10**9] * 4), "block pairs"),
        (in_case(FEW, mask="AA=="), "a mask of 1 bytes"),
        (in_case(FEW, mask="?"), "not a parity report"),
    ],
)
def test_malformed_reports_are_refused(record: dict[str, Any], tmp_path: Path, change: Change, said: str) -> None:
    broken = json.loads(json.dumps(record))
    change(broken)
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    with pytest.raises(ReportError) as refusal:
        read_report(tmp_path / "broken.json")
    assert said in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", "[]", "null"])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "no.json").write_text(text)
    with pytest.raises(ReportError, match="not a parity report"):
        read_report(tmp_path / "no.json")
    with pytest.raises(ReportError, match="cannot be read"):
        read_report(tmp_path / "missing.json")


@given(st.integers(0, 2**32 - 1), st.integers(100, 5000), st.floats(1e-6, 1e3))
def test_a_sketch_tells_how_far_two_arrays_are_apart(seed: int, size: int, distance: float) -> None:
    rng = np.random.default_rng(seed)
    x, step = rng.normal(size=size), rng.normal(size=size) * distance
    estimate = sketch.rms_difference(sketch.sketch(x), sketch.sketch(x + step), size)
    assert estimate == pytest.approx(np.sqrt(np.mean(step**2)), rel=0.6)
    assert sketch.rms_difference(sketch.sketch(x), sketch.sketch(x.copy()), size) == 0.0


def test_a_sketch_leaves_out_what_is_not_finite_and_the_pattern_says_where() -> None:
    x = np.array([1.0, np.nan, np.inf, -np.inf])
    assert sketch.sketch(x) == sketch.sketch(np.array([1.0, 0.0, 0.0, 0.0]))
    assert sketch.pattern(x) != sketch.pattern(x[[0, 1, 3, 2]])
    assert sketch.digest(np.array([0.0, np.nan])) == sketch.digest(np.array([-0.0, -np.nan]))
