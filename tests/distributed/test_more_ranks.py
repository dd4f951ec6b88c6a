"""Five to eight processes compute what one computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.distributed.cases import Case, on_a_mesh, on_ranks
from tests.distributed.test_exact import check
from tests.distributed.workers import Workers, on_the_cpu

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    on_the_cpu,
    pytest.mark.filterwarnings("ignore::rainfusion.SparsityWarning", "ignore::rainfusion.SpeedWarning"),
]

MOST = 8
CASE = Case(heads=9, kv_heads=9, sparsity=(0.7, 0.2, 0.5, 0.4, 0.1, 0.3, 0.8, 0.6, 0.9), sink="first_frame")
SUMMARY = Case(heads=8, kv_heads=4, omitted="summary", batch=2, kv_lengths=(66, 40), sink=None)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Eight processes of one group."""
    pytest.importorskip("torch")
    started = Workers(tmp_path_factory.mktemp("rendezvous") / "file", MOST)
    yield started
    started.stop()


@pytest.mark.parametrize("case", [CASE, SUMMARY, replace(CASE, balanced=True)], ids=["shares", "summary", "balanced"])
@pytest.mark.parametrize("method", ["ulysses", "gather", "ring"])
@pytest.mark.parametrize("world", range(5, MOST + 1))
def test_many_ranks_compute_what_one_does(eight: Workers, world: int, method: str, case: Case) -> None:
    case = replace(case, method=method)
    for found in eight.results(world, on_ranks, case):
        check(case, found)


@pytest.mark.parametrize("case", [CASE, SUMMARY, replace(CASE, balanced=True)], ids=["shares", "summary", "balanced"])
@pytest.mark.parametrize("shape", [(5, 1), (2, 3), (3, 2), (1, 7), (2, 4), (4, 2)], ids=str)
def test_a_mesh_computes_what_one_does(eight: Workers, shape: tuple[int, int], case: Case) -> None:
    case = replace(case, method="unified")
    results = eight.results(MOST, on_a_mesh, case, shape)
    ranks = shape[0] * shape[1]
    assert results[ranks:] == [None] * (MOST - ranks)
    for found in results[:ranks]:
        check(case, found)
