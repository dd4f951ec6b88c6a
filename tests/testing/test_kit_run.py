"""Runs of the kit as a third party starts them: exit status, expected failures, the report."""

from __future__ import annotations

import json
from textwrap import dedent
from typing import Any

import pytest

from rainfusion.testing.report import KIT_REVISION

pytestmark = [pytest.mark.kit, pytest.mark.slow]
PLUGIN = ("-p", "rainfusion.testing.pytest_plugin")
KIT = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *PLUGIN, "--pyargs", "rainfusion.testing")
FEW = ("-k", "ragged_row and bf16 or claims or announcement")
BACKENDS = """
    from rainfusion import Capabilities
    from rainfusion.backends.reference import ReferenceBackend

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


@pytest.fixture
def suite(backends: Any) -> Any:
    """Run a suite of one's own: its conftest opts in, its class says what is expected to fail."""

    def run_suite(backend: str, body: str, *options: str) -> tuple[int, str, dict[str, Any]]:
        (backends.folder / "conftest.py").write_text('pytest_plugins = ["rainfusion.testing.pytest_plugin"]\n')
        source = f"import pytest\nfrom rainfusion.testing import ConformanceSuite\n\n{dedent(body)}"
        (backends.folder / "test_own.py").write_text(
            source.replace("SUITE", f'ConformanceSuite):\n    backend = "{backend}"')
        )
        report = backends.folder / "out.json"
        done = backends.start(
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", *FEW, "test_own.py"),
            f"--rainfusion-report={report}",
            *options,
        )
        return done.returncode, done.stdout + done.stderr, json.loads(report.read_text(encoding="utf-8"))

    return run_suite


def run(site: Any, backend: str, *options: str, few: tuple[str, ...] = FEW) -> tuple[int, str, dict[str, Any]]:
    report = site.folder / "reports" / "out.json"
    done = site.start(*KIT, *few, f"--rainfusion-backend={backend}", f"--rainfusion-report={report}", *options)
    return done.returncode, done.stdout + done.stderr, json.loads(report.read_text(encoding="utf-8"))


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {test["test"]: test["outcome"] for test in report["tests"]}


def the(report: dict[str, Any], name: str) -> dict[str, Any]:
    (test,) = (test for test in report["tests"] if test["test"] == name)
    return test


def test_a_right_backend_passes_and_the_report_says_on_what_evidence(backends: Any) -> None:
    status, _, report = run(backends, "right")
    assert status == 0
    assert (report["rainfusion_report"], report["kit"]) == (3, KIT_REVISION)
    assert {"rainfusion", "commit", "date", "platform", "cpu", "python", "numpy", "torch"} <= {*report["environment"]}
    target = report["target"]
    assert (target["backend"], target["device"], target["revision"], target["stand_in"]) == ("right", "cpu", 1, "")
    assert target["capabilities"]["dtypes"] == ["bfloat16", "float16", "float32", "float64"]
    assert [*outcomes(report).values()] == ["passed"] * 5
    test = the(report, "test_attention[ragged_row-bf16]")
    seen = test["observation"]
    assert test["seconds"] > 0
    assert seen["error"] <= seen["allowed"]
    assert seen["lse_error"] <= seen["lse_allowed"]
    assert len(seen["inputs"]) == 64


def test_a_backend_is_not_failed_for_being_slow(backends: Any) -> None:
    status, output, _ = run(backends, "slow", "-W", "error::rainfusion.core.errors.SpeedWarning")
    assert status == 0, output


def test_a_wrong_backend_fails_and_the_report_is_written(backends: Any) -> None:
    status, _, report = run(backends, "wrong")
    assert status == 1
    found = outcomes(report)
    assert found["test_attend[ragged_row-bf16]"] == found["test_attention[ragged_row-bf16]"] == "failed"
    assert found["test_select[ragged_row-bf16]"] == "passed"
    test = the(report, "test_attend[ragged_row-bf16]")
    assert test["observation"]["error"] > test["observation"]["allowed"]
    assert "ragged_row-bf16: the output is off by" in test["reason"]


EXPECTED = """
    class TestOwn(SUITE

        def test_attend(self, request, target, case, note):
            if case.name.startswith("ragged_row"):
                request.applymarker(pytest.mark.xfail(reason="ten percent off (acme#7)", strict=True))
            super().test_attend(target, case, note)

        @pytest.mark.xfail(reason="ten percent off (acme#7)", strict=True)
        def test_attention(self, target, case, note):
            super().test_attention(target, case, note)
"""


def test_failures_are_expected_by_pytests_own_means(suite: Any) -> None:
    status, said, report = suite("wrong", EXPECTED)
    assert status == 0, said
    test = the(report, "test_attend[ragged_row-bf16]")
    assert (test["outcome"], test["reason"]) == ("xfailed", "ten percent off (acme#7)")


def test_an_expected_failure_that_passes_fails(suite: Any) -> None:
    status, said, report = suite("right", EXPECTED)
    assert status == 1
    assert outcomes(report)["test_attend[ragged_row-bf16]"] == "failed"
    assert "XPASS(strict)" in said


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    [
        ("absent", (), "nothing to test: backend 'absent' finds no device here (devices: none)"),
        ("right", ("--rainfusion-device=cuda:0",), "nothing to test: backend 'right' finds no device cuda:0 here"),
        ("unknown", (), "backend 'unknown' is not known"),
        ("", (), "no backend to test: give --rainfusion-backend"),
    ],
)
def test_without_a_device_nothing_is_green(backends: Any, backend: str, options: tuple[str, ...], reason: str) -> None:
    status, said, report = run(backends, backend, *options)
    assert status == 1
    assert reason in said
    assert {*outcomes(report).values()} == {"error"}


def test_expected_failures_do_not_stand_in_for_a_device(suite: Any) -> None:
    status, said, report = suite("absent", "@pytest.mark.xfail(reason='x')\nclass TestOwn(SUITE\n")
    assert status == 1
    assert {*outcomes(report).values()} == {"xfailed"}
    assert "no evidence" in said


def test_a_report_is_about_one_backend(backends: Any) -> None:
    source = "from rainfusion.testing import ConformanceSuite\n"
    source += "".join(f"class Test{x}(ConformanceSuite):\n    backend = '{x}'\n" for x in ("right", "slow"))
    (backends.folder / "test_own.py").write_text(source)
    report = backends.folder / "out.json"
    options = ("-q", *PLUGIN, "-k", "claims", "test_own.py")
    assert backends.start("-m", "pytest", *options).returncode == 0
    done = backends.start("-m", "pytest", *options, f"--rainfusion-report={report}")
    assert done.returncode == 1
    assert "no report: it is about one backend on one device, and these ran: right on cpu, slow on cpu" in done.stdout
    assert not report.exists()


def test_skips_alone_are_no_evidence(backends: Any) -> None:
    status, said, report = run(backends, "modest")
    assert status == 1
    assert "no evidence: no case of the conformance kit passed" in said
    reasons = {test["reason"] for test in report["tests"] if test["outcome"] == "skipped"}
    assert reasons == {"modest on cpu does not claim it: no head dim 128 (it has 96)"}


def test_the_claims_beyond_the_cases_are_tried_too(backends: Any) -> None:
    status, _, report = run(backends, "modest", few=("-k", "contract and not float"))
    assert (status, outcomes(report)["test_contract_every_claimed_shape"]) == (0, "passed")


def test_running_no_test_of_the_kit_is_no_evidence(backends: Any) -> None:
    (backends.folder / "test_other.py").write_text("def test_other(): pass\n")
    done = backends.start("-m", "pytest", "-q", *PLUGIN, "test_other.py", "--rainfusion-backend=right")
    assert done.returncode == 1
    assert backends.start("-m", "pytest", "-q", *PLUGIN, "test_other.py").returncode == 0


def test_no_option_appears_in_other_projects(backends: Any) -> None:
    (backends.folder / "test_other.py").write_text("def test_other(): pass\n")
    assert backends.start("-m", "pytest", "-q", "test_other.py", "--rainfusion-huge").returncode == 4


def test_what_imitates_a_device_is_in_the_report(backends: Any) -> None:
    report = backends.folder / "out.json"
    options = ("--rainfusion-backend=right", f"--rainfusion-report={report}")
    backends.start(*KIT, *FEW, *options, RAINFUSION_STAND_IN="an interpreter")
    assert json.loads(report.read_text())["target"]["stand_in"] == "an interpreter"


def test_tensors_of_two_billion_elements_are_tested_on_request(backends: Any) -> None:
    few = ("-k", "huge or announcement or ragged_row and bf16")
    status, _, report = run(backends, "right", few=few)
    assert status == 0
    reasons = {test["test"]: test.get("reason") for test in report["tests"]}
    assert reasons["test_huge[bhsd]"] == reasons["test_huge[bshd]"] == "not asked for: --rainfusion-huge"
    status, said, report = run(backends, "right", "--rainfusion-huge", few=few)
    assert status == 1
    assert outcomes(report)["test_huge[bhsd]"] == "failed"
    assert "right on cpu computes in host memory; --rainfusion-huge is for accelerators" in said
