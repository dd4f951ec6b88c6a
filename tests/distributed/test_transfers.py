"""What a ring does not need, it does not send; a rank has as much to do as the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

import rainfusion
from tests.distributed.cases import DEVICE, Case, Result, on_ranks
from tests.distributed.test_exact import check
from tests.distributed.workers import WORLD, Workers

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore::rainfusion.SparsityWarning", "ignore::rainfusion.SpeedWarning"),
]


class Masked(Case):
    """A case whose heads read, on every rank, some rows of the shards that `reads` names."""

    reads: np.ndarray  # bool [rank, shard, head]

    def _mask(self, rng: np.random.Generator, blocks: tuple[int, int]) -> rainfusion.BlockMask:
        import torch

        world = len(self.reads)
        kept = np.zeros((1, self.heads, *blocks), np.bool_)
        rows, columns = (np.arange(world + 1) * n // world for n in blocks)
        for reader, owner, head in zip(*self.reads.nonzero(), strict=True):
            kept[0, head, rows[reader], columns[owner] : columns[owner + 1]] = True
        mask = torch.from_numpy(kept).to(DEVICE)
        return rainfusion.BlockMask(mask, self.length, self.length, self.layout.block, self.layout)


def masked(reads: np.ndarray, **kind: Any) -> Masked:
    case = Masked("ring", heads=4, kv_heads=2, grid=(1, 4, 4 * WORLD), text=0, sink=None, operand="mask", **kind)
    object.__setattr__(case, "reads", reads)
    return case


def elements_sent(group: Any, case: Case) -> tuple[int, Result]:
    """How many numbers of keys and values this rank sends to others, and what comes of it."""
    from unittest import mock

    import torch.distributed as dist

    sent, real = [], dist.batch_isend_irecv

    def counted(operations: list[Any]) -> Any:
        sent.extend(operation.tensor.numel() for operation in operations if operation.op is dist.isend)
        return real(operations)

    with mock.patch.object(dist, "batch_isend_irecv", counted):
        found = on_ranks(group, case)
    return sum(sent), found


def check_sends(workers: Workers, case: Masked) -> None:
    """A head of a shard travels as far as the last rank that reads it."""
    answers = workers.results(WORLD, elements_sent, case)
    of_key_heads = case.reads.reshape(WORLD, WORLD, case.kv_heads, -1).any(axis=-1)
    away = (np.arange(WORLD)[:, None] - np.arange(WORLD)) % WORLD
    hops = int((of_key_heads * away[..., None]).max(axis=0).sum())
    keys_and_values = 2 * case.length // WORLD * case.head_dim
    assert sum(sent for sent, _ in answers) == hops * keys_and_values
    for _, found in answers:
        check(case, found)


NEIGHBOURS = np.eye(WORLD, dtype=np.bool_) | np.roll(np.eye(WORLD, dtype=np.bool_), 1, axis=0)


@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize(
    "shards",
    [np.zeros((WORLD, WORLD)), np.eye(WORLD), NEIGHBOURS, np.ones((WORLD, WORLD))],
    ids=["none", "own", "and the one before", "all"],
)
def test_what_no_rank_keeps_is_not_sent(workers: Workers, shards: np.ndarray, omitted: str) -> None:
    reads = np.repeat(shards.astype(np.bool_)[..., None], 4, axis=2)
    if omitted == "summary":
        reads[:, :, 1] = True  # one head reads everything
    check_sends(workers, masked(reads, omitted=omitted))


@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_what_is_not_sent_does_not_count_in_8_bits(workers: Workers, omitted: str) -> None:
    reads = np.repeat(NEIGHBOURS[..., None], 4, axis=2)
    check_sends(workers, masked(reads, omitted=omitted, precision="int8"))


@settings(max_examples=15)
@given(arrays.arrays(np.bool_, (WORLD, WORLD, 4)))
def test_any_mask_sends_what_is_read(workers: Workers, reads: np.ndarray) -> None:
    check_sends(workers, masked(reads))


def test_a_selection_of_all_sends_all(workers: Workers) -> None:
    case = Case("ring", sparsity=0.0, sink=None)
    answers = workers.results(WORLD, elements_sent, case)
    assert sum(sent for sent, _ in answers) == (WORLD - 1) * 2 * case.length * case.kv_heads * case.head_dim
    for _, found in answers:
        check(case, found)


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("free_and_text", [(16, 8), (7, 2), (3, 5), (8, 0), (1, 7)])
def test_balanced_shards_have_equally_many_dense_rows(world: int, free_and_text: tuple[int, int]) -> None:
    pytest.importorskip("torch")
    from rainfusion.distributed.shards import Shards

    free, text = free_and_text
    layout = rainfusion.TokenLayout((1, 1, 4 * free), text=4 * text, block=4, sink=None)
    shards = Shards.even(layout, 4 * (free + text), world, balanced=True)
    blocks = [[n for start, stop in spans for n in range(start // 4, stop // 4)] for spans in shards.spans]
    assert sorted(block for of in blocks for block in of) == list(range(free + text))
    for counts in ([sum(n >= free for n in of) for of in blocks], [sum(n < free for n in of) for of in blocks]):
        assert max(counts) - min(counts) <= 1
    assert min(shards.lengths) > 0


def test_balanced_shards_keep_equally_many_pairs(workers: Workers) -> None:
    case = Case(grid=(8, 8, 8), text=0, block=8, sparsity=0.75, sink="first_frame")
    in_turn, balanced = (workers.results(1, kept_by_rank, case, balanced)[0] for balanced in (False, True))
    assert max(in_turn) > 1.5 * min(in_turn)
    assert max(balanced) < 1.01 * min(balanced)


def kept_by_rank(_: Any, case: Case, balanced: bool) -> list[int]:
    """Block pairs that each of four ranks attends to."""
    from rainfusion.distributed.shards import Shards

    mask = rainfusion.attention(*case.tensors(), return_mask=True, **case.settings)[1]
    shards = Shards.even(case.layout, case.length, 4, balanced=balanced)
    return [int(shards.taken(mask.blocks, rank, 2, 8).sum()) for rank in range(4)]
