"""The processes that the tests of this folder share: started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Workers


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Four processes on gloo."""
    pytest.importorskip("torch")
    started = Workers(tmp_path_factory.mktemp("rendezvous") / "file")
    yield started
    started.stop()
