"""Level: what the three levels of the suite share: the backend under test, the cases, the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from rainfusion.core.errors import BackendError
from rainfusion.core.mask import BlockMask
from rainfusion.core.problem import DTYPES, TENSOR_LAYOUTS
from rainfusion.plugins.conformance.cases import Case, every_case
from rainfusion.plugins.conformance.evidence import Evidence
from rainfusion.plugins.conformance.measure import agreement, relative_error, worst_error
from rainfusion.plugins.conformance.oracle import expected, expected_mask
from rainfusion.plugins.conformance.target import Outcome, Target, find_target


class Level:
    """Base of the levels.

    Attributes:
        backend: name of the backend under test; empty takes ``--rainfusion-backend``.
        device: its device; None takes ``--rainfusion-device``, or else the backend's best.
    """

    backend: str = ""
    device: str | None = None

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test once for each case, for each case that selects its mask, each dtype or tensor layout."""
        values: dict[str, Callable[[], Iterable[Any]]] = {
            "case": every_case,
            "selecting_case": lambda: [case for case in every_case() if case.selects],
            "dtype": lambda: DTYPES,
            "layout": lambda: TENSOR_LAYOUTS,
        }
        for name in values.keys() & {*metafunc.fixturenames}:
            metafunc.parametrize(name, values[name](), ids=str)

    @pytest.fixture
    def evidence(self, request: pytest.FixtureRequest) -> Evidence:
        """What the report will say about this test."""
        return Evidence.of(request.node)

    @pytest.fixture
    def target(self, request: pytest.FixtureRequest, evidence: Evidence) -> Target:
        """The backend under test on its device; without one the test is an error, never a skip."""
        backend = self.backend or request.config.getoption("--rainfusion-backend")
        if not backend:
            pytest.fail(
                "no backend to test: give --rainfusion-backend, or set `backend` in the subclass", pytrace=False
            )
        try:
            target = find_target(backend, self.device or request.config.getoption("--rainfusion-device"))
        except BackendError as error:
            pytest.fail(str(error), pytrace=False)
        evidence.ran_on(target)
        return target


def take_up(case: Case, target: Target, evidence: Evidence) -> None:
    """Note the case; skip it if it is beyond the capabilities, naming the capability."""
    evidence.record.update(case=case.name, dtype=case.problem.dtype)
    objections = target.objections(case)
    if objections:
        pytest.skip(f"{target} does not claim it: {objections}")
    evidence.record["inputs"] = case.fingerprint()


def check_values(case: Case, mask: BlockMask | None, got: Outcome, evidence: Evidence) -> None:
    """Output and log-sum-exp, if there is one, are within the tolerance of the oracle under `mask`."""
    right = expected(case, mask)
    absolute = worst_error(got.out, right.out)
    evidence.saw(absolute=absolute, relative=relative_error(got.out, right.out), tolerance=right.out_limit)
    problems = _over(right.out_limit, absolute, "output")
    if got.lse is not None:
        error = worst_error(got.lse, right.lse)
        evidence.saw(lse=error, lse_tolerance=right.lse_limit)
        problems += _over(right.lse_limit, error, "log-sum-exp")
    fail_if(problems, case)


def check_choice(case: Case, mask: BlockMask, evidence: Evidence) -> None:
    """The mask has the planned counts, keeps what is protected, and differs from the oracle's at near ties only."""
    plan, right, blocks = case.plan(), expected_mask(case), mask.blocks
    evidence.saw(mask_agreement=agreement(blocks, right.blocks))
    counts = blocks.sum(axis=-1)
    problems = []
    if plan.row_counts is not None and (counts != plan.row_counts).any():
        problems.append(f"rows keep {_span(counts)} blocks where {_span(plan.row_counts)} were planned, row by row")
    if not counts.all():
        problems.append("a row keeps no block")
    if not (blocks[..., plan.q_axis.free_blocks :, :].all() and blocks[..., plan.kv_axis.free_blocks :].all()):
        problems.append("a protected block is skipped")
    wrong = (blocks != right.blocks) & ~right.undecided
    if wrong.any():
        problems.append(f"{int(wrong.sum())} of {wrong.size} block pairs are chosen wrongly, and not by near ties")
    fail_if(problems, case)


def fail_if(problems: list[str], subject: Any) -> None:
    """Fail with all problems at once."""
    if problems:
        raise AssertionError(f"{subject}: {'; '.join(problems)}")


def _over(limit: float, error: float, what: str) -> list[str]:
    return [] if error <= limit else [f"the {what} is off by {error:.3g} (at most {limit:.3g})"]


def _span(counts: Any) -> str:
    return f"{int(counts.min())} to {int(counts.max())}"
