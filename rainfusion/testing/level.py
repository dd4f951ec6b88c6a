"""Level: what the levels of the suite share: the backend under test, the cases, what is noted for the report."""

from __future__ import annotations

from typing import Any

import pytest

from rainfusion.core.errors import BackendError
from rainfusion.core.problem import DTYPES, TENSOR_LAYOUTS
from rainfusion.testing import pytest_plugin
from rainfusion.testing.cases import Case, every_case
from rainfusion.testing.observation import Observation, verdict
from rainfusion.testing.observe import observe
from rainfusion.testing.target import Target, find_target

Note = dict[str, Any]


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
        values: dict[str, Any] = {
            "case": every_case,
            "selecting_case": lambda: [case for case in every_case() if case.selects],
            "dtype": lambda: DTYPES,
            "layout": lambda: TENSOR_LAYOUTS,
        }
        for name in values.keys() & {*metafunc.fixturenames}:
            metafunc.parametrize(name, values[name](), ids=str)

    @pytest.fixture
    def note(self, request: pytest.FixtureRequest) -> Note:
        """What the report will say about this test."""
        return pytest_plugin.note(request.node)

    @pytest.fixture
    def target(self, request: pytest.FixtureRequest, note: Note) -> Target:
        """The backend under test on its device; without one the test is an error, never a skip."""
        option = request.config.getoption
        try:
            target = find_target(
                self.backend or option("--rainfusion-backend"), self.device or option("--rainfusion-device")
            )
        except BackendError as error:
            pytest.fail(str(error), pytrace=False)
        note["target"] = target.described()
        return target


def check(target: Target, case: Case, level: str, note: Note) -> None:
    """Observe a case and fail with all that is wrong; skip it where it is beyond the claims, naming the capability."""
    note["observation"] = Observation(level, case.name, case.problem.dtype).to_json()  # if the backend raises
    seen = observe(target, case, level)
    note["observation"] = seen.to_json()
    if seen.refused:
        pytest.skip(seen.refused)
    fail_if(verdict(seen), case)


def fail_if(problems: list[str], subject: Any) -> None:
    """Fail with all problems at once."""
    if problems:
        raise AssertionError(f"{subject}: {'; '.join(problems)}")
