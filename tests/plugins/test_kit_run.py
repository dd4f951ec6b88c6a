"""Runs of the kit as a third party starts them: exit status, known failures, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

KIT = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "rainfusion.plugins.conformance")
FEW = ("-k", "ragged_row and bf16 or claims or announcement")
BACKENDS = """
    from rainfusion import Capabilities
    from rainfusion.backends.reference.backend import ReferenceBackend

    class Right(ReferenceBackend):
        name = "right"

    class Wrong(ReferenceBackend):
        name = "wrong"
        def from_native(self, array, like, dtype):
            result = super().from_native(array, like, dtype)
            return result if dtype == "bool" else result * result.dtype.type(1.1)

    class Absent(ReferenceBackend):
        name = "absent"
        def devices(self): return []

    class Modest(ReferenceBackend):
        name = "modest"
        def capabilities(self, device): return Capabilities(head_dims=frozenset({96}))

    class Slow(ReferenceBackend):
        name = "slow"
        def speedup(self, plan, device): return 0.5
"""


@pytest.fixture
def backends(site: Any, plugin: Any) -> Any:
    names = ("Right", "Wrong", "Absent", "Modest", "Slow")
    source = plugin(**{name.lower(): f"five_backends:{name}" for name in names})
    site.add("five", {"five": "five_plugin"}, {"five_plugin.py": source})
    site.add("five-backends", {}, {"five_backends.py": BACKENDS})
    return site


def xfails(site: Any, *tests: str) -> str:
    entries = (f'[[xfail]]\ntest = "{test}"\nreason = "ten percent off"\nissue = "acme#7"\n' for test in tests)
    path = site.folder / "xfails.toml"
    path.write_text("\n".join(entries))
    return f"--rainfusion-xfails={path}"


def run(site: Any, backend: str, *options: str, few: tuple[str, ...] = FEW) -> tuple[int, str, dict[str, Any]]:
    report = site.folder / "reports" / "out.json"
    done = site.start(*KIT, *few, f"--rainfusion-backend={backend}", f"--rainfusion-report={report}", *options)
    return done.returncode, done.stdout + done.stderr, json.loads(report.read_text(encoding="utf-8"))


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    (suite,) = report["suites"]
    return {test["test"]: test["outcome"] for test in suite["tests"]}


def test_a_right_backend_passes_and_the_report_says_on_what_evidence(backends: Any) -> None:
    status, _, report = run(backends, "right")
    assert status == 0
    assert (report["rainfusion_report"], report["kit"]) == (2, 1)
    assert {"rainfusion", "commit", "date", "platform", "cpu", "python", "numpy", "torch"} <= {*report["environment"]}
    (suite,) = report["suites"]
    assert (suite["backend"], suite["device"], suite["outcomes"]) == ("right", "cpu", {"passed": 5})
    assert (suite["revision"], suite["stand_in"]) == (1, "")
    assert suite["capabilities"]["dtypes"] == ["bfloat16", "float16", "float32", "float64"]
    (test,) = (test for test in suite["tests"] if test["test"] == "test_attention[ragged_row-bf16]")
    assert test["absolute"] <= test["tolerance"]
    assert test["lse"] <= test["lse_tolerance"]
    assert {"relative", "seconds"} <= {*test}
    assert len(test["inputs"]) == 64


def test_a_backend_is_not_failed_for_being_slow(backends: Any) -> None:
    status, output, _ = run(backends, "slow", "-W", "error::rainfusion.core.errors.SpeedWarning")
    assert status == 0, output


def test_a_wrong_backend_fails_and_the_report_is_written(backends: Any) -> None:
    status, _, report = run(backends, "wrong")
    assert status == 1
    found = outcomes(report)
    assert found["test_attend[ragged_row-bf16]"] == found["test_attention[ragged_row-bf16]"] == "failed"
    assert found["test_select[ragged_row-bf16]"] == "passed"
    (suite,) = report["suites"]
    (test,) = (test for test in suite["tests"] if test["test"] == "test_attend[ragged_row-bf16]")
    assert test["absolute"] > test["tolerance"]
    assert "ragged_row-bf16: the output is off by" in test["reason"]


def test_known_failures_are_expected(backends: Any) -> None:
    status, _, report = run(backends, "wrong", xfails(backends, "test_att*[ragged_row-*]"))
    assert status == 0
    (suite,) = report["suites"]
    (test,) = (test for test in suite["tests"] if test["test"] == "test_attend[ragged_row-bf16]")
    assert (test["outcome"], test["reason"]) == ("xfailed", "ten percent off (acme#7)")


def test_a_known_failure_that_passes_fails(backends: Any) -> None:
    status, said, report = run(backends, "right", xfails(backends, "test_attend[ragged_row-bf16]"))
    assert status == 1
    assert outcomes(report)["test_attend[ragged_row-bf16]"] == "failed"
    assert "XPASS(strict)" in said


def test_a_known_failure_of_no_test_is_an_error(backends: Any) -> None:
    status, said, _ = run(backends, "right", xfails(backends, "test_attend[renamed-*]"))
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "'test_attend[renamed-*]' names no test" in said


@pytest.mark.parametrize(
    "text",
    ["[[xfail]\n", "[[xfail]]\ntest='x'\nreason='y'\n", "[[xfails]]\n", "[[xfail]]\ntest='x'\nreason=''\nissue='1'"],
)
def test_a_malformed_file_is_an_error(backends: Any, text: str) -> None:
    path = Path(backends.folder) / "xfails.toml"
    path.write_text(text)
    done = backends.start(*KIT, "--rainfusion-backend=right", f"--rainfusion-xfails={path}")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--rainfusion-xfails: " in done.stderr


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [
        ("absent", (), "nothing to test: backend 'absent' finds no device here (devices: none)"),
        ("right", ("--rainfusion-device=cuda:0",), "nothing to test: backend 'right' finds no device cuda:0 here"),
        ("nobody", (), "backend 'nobody' is not known"),
        ("", (), "no backend to test: give --rainfusion-backend"),
    ],
)
def test_without_a_device_nothing_is_green(backends: Any, backend: str, options: tuple[str, ...], reason: str) -> None:
    status, said, report = run(backends, backend, *options)
    assert status == 1
    assert reason in said
    assert {*outcomes(report).values()} == {"error"}


def test_known_failures_do_not_stand_in_for_a_device(backends: Any) -> None:
    status, said, report = run(backends, "absent", xfails(backends, "*"))
    assert status == 1
    assert {*outcomes(report).values()} == {"xfailed"}
    assert "no evidence" in said


def test_skips_alone_are_no_evidence(backends: Any) -> None:
    status, said, report = run(backends, "modest")
    assert status == 1
    assert "no evidence: no case of the conformance kit passed" in said
    reasons = {test["reason"] for test in report["suites"][0]["tests"] if test["outcome"] == "skipped"}
    assert reasons == {"modest on cpu does not claim it: no head dim 128 (it has 96)"}


def test_the_claims_beyond_the_cases_are_tried_too(backends: Any) -> None:
    status, _, report = run(backends, "modest", few=("-k", "contract and not float"))
    assert (status, outcomes(report)["test_contract_every_claimed_shape"]) == (0, "passed")


def test_running_no_test_of_the_kit_is_no_evidence(backends: Any) -> None:
    (backends.folder / "test_other.py").write_text("def test_other(): pass\n")
    done = backends.start("-m", "pytest", "-q", "test_other.py", "--rainfusion-backend=right")
    assert done.returncode == 1
    assert backends.start("-m", "pytest", "-q", "test_other.py").returncode == 0


def test_what_imitates_a_device_is_in_the_report(backends: Any) -> None:
    report = backends.folder / "out.json"
    options = ("--rainfusion-backend=right", f"--rainfusion-report={report}")
    backends.start(*KIT, *FEW, *options, RAINFUSION_STAND_IN="an interpreter")
    assert json.loads(report.read_text())["suites"][0]["stand_in"] == "an interpreter"


@pytest.mark.parametrize(
    ("device", "status", "outcome"), [("cpu", 0, "xfailed"), ("NumPy on*", 0, "xfailed"), ("cuda:*", 1, "failed")]
)
def test_a_known_failure_may_be_that_of_a_device(backends: Any, device: str, status: int, outcome: str) -> None:
    path = Path(backends.folder) / "xfails.toml"
    path.write_text(
        f'[[xfail]]\ntest = "test_att*"\nreason = "ten percent off"\nissue = "acme#7"\ndevice = "{device}"\n'
    )
    ended, _, report = run(backends, "wrong", f"--rainfusion-xfails={path}")
    assert (ended, outcomes(report)["test_attend[ragged_row-bf16]"]) == (status, outcome)


def test_a_known_failure_of_another_device_is_not_stale(backends: Any) -> None:
    path = Path(backends.folder) / "xfails.toml"
    path.write_text('[[xfail]]\ntest = "test_att*"\nreason = "x"\nissue = "acme#7"\ndevice = "cuda:*"\n')
    assert run(backends, "right", f"--rainfusion-xfails={path}")[0] == 0


def test_tensors_of_two_billion_elements_are_tested_on_request(backends: Any) -> None:
    few = ("-k", "huge or announcement or ragged_row and bf16")
    status, _, report = run(backends, "right", few=few)
    assert status == 0
    reasons = {test["test"]: test.get("reason") for test in report["suites"][0]["tests"]}
    assert reasons["test_huge[bhsd]"] == reasons["test_huge[bshd]"] == "not asked for: --rainfusion-huge"
    status, said, report = run(backends, "right", "--rainfusion-huge", few=few)
    assert status == 1
    assert outcomes(report)["test_huge[bhsd]"] == "failed"
    assert "right on cpu computes in host memory; --rainfusion-huge is for accelerators" in said
