"""Two reports: what is shown to agree, what is not, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rainfusion.testing import numbers
from rainfusion.testing.cases import every_case
from rainfusion.testing.environment import environment
from rainfusion.testing.observation import Agreement
from rainfusion.testing.observe import observe
from rainfusion.testing.report import Report, ReportError, Result, compare, read_report
from rainfusion.testing.target import find_target

pytestmark = pytest.mark.kit
NAMES = ("blocks_of_32-f32", "nan_query-bf16", "poisoned_block_in_a_video-f32", "dense-f64", "given_mask-f16")
Change = Callable[[dict[str, Any]], None]
Found = dict[tuple[str, str], Agreement]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What a machine writes whose backend is right."""
    target = find_target("reference")
    cases = [case for case in every_case() if case.name in NAMES]
    results = [Result.of(observe(target, case, level)) for case in cases for level in ("attend", "attention")]
    assert all(result.outcome == "passed" for result in results)
    text = Report(target.described(), environment(), results).to_json()
    return json.loads(text)  # type: ignore[no-any-return]


@pytest.fixture
def compared(record: dict[str, Any], tmp_path: Path) -> Callable[[Change], Found]:
    """Compare the record with one in which something is changed."""

    def compared(change: Change) -> Found:
        other = json.loads(json.dumps(record))
        change(other)
        for name, content in (("a", record), ("b", other)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        a, b = (read_report(tmp_path / f"{name}.json") for name in "ab")
        return {(found.case, found.level): found for found in compare(a, b)}

    return compared


def in_case(case: str, level: str = "attend", **changes: Any) -> Change:
    """Change what is said of one case; a function is given the old value, None takes it out."""

    def change(report: dict[str, Any]) -> None:
        (seen,) = (
            test["observation"]
            for test in report["tests"]
            if (test["observation"]["case"], test["observation"]["level"]) == (case, level)
        )
        for key, value in changes.items():
            seen[key] = value(seen.get(key)) if callable(value) else value
            if value is None:
                del seen[key]

    return change


def moved(sums: str, by: float = 1.0) -> str:
    return base64.b64encode((np.frombuffer(base64.b64decode(sums)) + by).tobytes()).decode()


def flipped(mask: list[Any] | None) -> list[Any]:
    *shape, text = mask or [1, 2, 10, 10, base64.b64encode(bytes(25)).decode()]
    bits = np.frombuffer(base64.b64decode(text), np.uint8).copy()
    bits[0] ^= 0x80
    return [*shape, base64.b64encode(bits.tobytes()).decode()]


def test_two_right_backends_agree(compared: Any) -> None:
    found = compared(lambda report: None)
    assert {*found} == {(name, level) for name in NAMES for level in ("attend", "attention")}
    assert all(x.ok and x.same_bits and x.bound <= x.allowed and x.rms in (0.0, None) for x in found.values())
    assert found[FEW, "attention"].same_mask == 1.0
    assert found[FEW, "attend"].rms == 0.0
    assert found["dense-f64", "attend"].same_mask is None


FEW, GIVEN = "blocks_of_32-f32", "given_mask-f16"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (in_case(FEW, error=1.0), "the second: the output is off by 1 (at most"),
        (in_case(FEW, error="inf"), "the second: the output is off by inf"),
        (in_case(FEW, error="nan"), "the second: the output is off by inf"),
        (in_case(FEW, "attention", lse_error=1.0), "the second: the log-sum-exp is off by 1"),
        (in_case(FEW, out=moved), "farther from the oracle than its error says"),
        (in_case(FEW, oracle=moved), "the two oracles are"),
        (in_case(FEW, pattern="other"), "NaN or infinity are elsewhere"),
        (in_case(FEW, "attention", selected=None), "only one report has the mask that its backend selects"),
        (in_case(FEW, elements=7), "the outputs are of different sizes"),
        (in_case(FEW, allowed=1.0), "that is not one rule"),
        (in_case(FEW, problems=["a row keeps no block"]), "the second: a row keeps no block"),
    ],
)
def test_what_is_not_one_answer_disagrees(compared: Any, change: Change, why: str) -> None:
    (found,) = (x for x in compared(change).values() if x.ok is not True)
    assert found.ok is False
    assert why in found.why


def test_outputs_that_are_apart_while_both_are_near_the_oracle(compared: Any) -> None:
    """An error that the backend admits, and the sketch shows."""
    found = compared(in_case(FEW, out=lambda x: moved(x, 1e-4), error=2e-6, allowed=2e-5))[FEW, "attend"]
    assert found.bound > 2e-6
    assert 0 < found.rms < found.bound


def test_another_choice_of_blocks_disagrees_unless_it_is_open(compared: Any) -> None:
    found = compared(in_case(FEW, "attention", selected=flipped))[FEW, "attention"]
    assert found.ok is False
    assert "1 of " in found.why
    assert "chosen otherwise, and not by near ties" in found.why
    assert found.bound is None
    assert compared(in_case(FEW, "attention", selected=flipped, undecided=flipped))[FEW, "attention"].ok


def test_outputs_under_different_masks_are_not_compared(compared: Any) -> None:
    found = compared(in_case(GIVEN, mask=flipped))[GIVEN, "attend"]
    assert found.ok is None
    assert "different masks" in found.why


def test_what_holds_errors_only_is_not_compared(compared: Any) -> None:
    found = compared(in_case(FEW, pattern=None))[FEW, "attend"]
    assert found.ok is None
    assert "holds errors only" in found.why


def test_what_one_backend_does_not_claim_is_refused(compared: Any) -> None:
    found = compared(in_case(FEW, refused="acme: no dtype float32"))
    assert [x.why for x in found.values() if x.ok is None] == ["acme: no dtype float32"]


def test_other_inputs_are_refused(compared: Any) -> None:
    with pytest.raises(
        ReportError, match=r"other inputs \(seeds 0 and 3\): 1 of 10 observations differ, the first is of given_mask"
    ):
        compared(in_case(GIVEN, inputs="0" * 64, seed=3))


def test_another_kit_and_other_cases_are_refused(compared: Any) -> None:
    with pytest.raises(ReportError, match=r"revisions \d and 9 of the conformance kit"):
        compared(lambda report: report.update(kit=9))
    with pytest.raises(ReportError, match="no case in common"):
        compared(lambda report: report["tests"].clear())


def test_hostile_text_is_not_printed(record: dict[str, Any], tmp_path: Path) -> None:
    record = {**record, "target": {**record["target"], "device_name": "chip\x1b[2J" + "x" * 9999}}
    (tmp_path / "c.json").write_text(json.dumps(record))
    who = read_report(tmp_path / "c.json").who
    assert "\x1b" not in who
    assert len(who) < 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda report: report.update(rainfusion_report=2), "format 2; this rainfusion reads 3"),
        (lambda report: report.pop("environment"), "it lacks 'environment'"),
        (lambda report: report.update(tests=[1]), "not a report"),
        (lambda report: report.update(benchmark=[]), "not a report"),
        (in_case(FEW, out="AA=="), "not a report"),
        (in_case(FEW, out=base64.b64encode(np.full(32, np.nan).tobytes()).decode()), "a sketch is 32 numbers"),
        (in_case(FEW, out=base64.b64encode(np.zeros(3).tobytes()).decode()), "a sketch is 32 numbers"),
        (in_case(FEW, error=10**400), "not a report"),
        (in_case(FEW, surprise=1), "does not know it"),
        (in_case(FEW, mask=[10**9] * 4 + ["AA=="]), "block pairs"),
        (in_case(FEW, mask=[1, 1, 9, 9, "AA=="]), "a mask of 1 bytes"),
        (in_case(FEW, mask=[1, 1, 1, 1, "?"]), "not a report"),
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
    with pytest.raises(ReportError, match="not a report"):
        read_report(tmp_path / "no.json")
    with pytest.raises(ReportError, match="cannot be read"):
        read_report(tmp_path / "missing.json")


@given(st.integers(0, 2**32 - 1), st.integers(100, 5000), st.floats(1e-6, 1e3))
def test_a_sketch_tells_how_far_two_arrays_are_apart(seed: int, size: int, distance: float) -> None:
    rng = np.random.default_rng(seed)
    x, step = rng.normal(size=size), rng.normal(size=size) * distance
    estimate = numbers.rms_difference(numbers.sketch(x), numbers.sketch(x + step), size)
    assert estimate == pytest.approx(np.sqrt(np.mean(step**2)), rel=0.6)
    assert numbers.rms_difference(numbers.sketch(x), numbers.sketch(x.copy()), size) == 0.0


def test_a_sketch_leaves_out_what_is_not_finite_and_the_pattern_says_where() -> None:
    x = np.array([1.0, np.nan, np.inf, -np.inf])
    assert numbers.sketch(x) == numbers.sketch(np.array([1.0, 0.0, 0.0, 0.0]))
    assert numbers.pattern(x) != numbers.pattern(x[[0, 1, 3, 2]])
    assert numbers.digest(np.array([0.0, np.nan])) == numbers.digest(np.array([-0.0, -np.nan]))
