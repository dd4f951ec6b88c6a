"""The pytest side of the kit: options, known failures, the report.

Every project's pytest loads this module, so it imports neither NumPy nor any backend.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rainfusion.plugins.conformance.evidence import Evidence
from rainfusion.plugins.conformance.report import Recorder
from rainfusion.plugins.conformance.xfails import Xfail, read_xfails

_SUITE = "rainfusion.plugins.conformance.suite"
_known = pytest.StashKey[tuple[Xfail, ...]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the five options of the kit."""
    group = parser.getgroup("rainfusion", "rainfusion conformance")
    group.addoption("--rainfusion-backend", metavar="NAME", help="the backend under test")
    group.addoption("--rainfusion-device", metavar="ADDRESS", help="its device, such as cuda:0 (default: its best)")
    group.addoption("--rainfusion-report", metavar="FILE", type=Path, help="write the outcome of every test as JSON")
    group.addoption("--rainfusion-xfails", metavar="FILE", type=Path, help="known failures, TOML; stale ones fail")
    group.addoption("--rainfusion-huge", action="store_true", help="also tensors of 2**31 elements: 22 GB on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    """Read the known failures before anything runs, and start recording in the process that reports."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config), "rainfusion-recorder")
    path = config.getoption("--rainfusion-xfails")
    if path is None:
        return
    try:
        config.stash[_known] = read_xfails(path)
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--rainfusion-xfails: {error}") from error


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note the backend of the kit's tests, and mark the known failures."""
    ours = [item for item in items if _is_of_the_kit(item)]
    if ours:
        _note_backends(config, ours)
    known = config.stash.get(_known, ())
    for xfail in known:
        matching = [item for item in ours if xfail.matches(item.name)]
        if not matching:
            raise pytest.UsageError(f"--rainfusion-xfails: {xfail.test!r} names no test; remove the stale entry")
        for item in matching:
            if not _is_about(xfail, item, config):
                continue
            item.add_marker(pytest.mark.xfail(reason=xfail.said, strict=True))


def _is_of_the_kit(item: pytest.Item) -> bool:
    suite, of = sys.modules.get(_SUITE), getattr(item, "cls", None)
    return suite is not None and of is not None and issubclass(of, suite.ConformanceSuite)


def _is_about(xfail: Xfail, item: pytest.Item, config: pytest.Config) -> bool:
    """Whether a known failure is one of the item's device; without a device nothing is known of it."""
    if xfail.device == "*":
        return True
    from rainfusion.core.errors import BackendError
    from rainfusion.plugins.conformance.target import find_target

    suite: Any = item.cls  # type: ignore[attr-defined]
    backend = suite.backend or config.getoption("--rainfusion-backend")
    try:
        target = find_target(backend, suite.device or config.getoption("--rainfusion-device"))
    except BackendError:
        return False
    return xfail.applies_to(str(target.device), target.device.name)


def _note_backends(config: pytest.Config, ours: list[pytest.Item]) -> None:
    for item in ours:
        backend = item.cls.backend or config.getoption("--rainfusion-backend")  # type: ignore[attr-defined]
        Evidence.of(item).record["backend"] = backend
