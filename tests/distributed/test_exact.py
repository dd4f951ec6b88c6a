"""Attention over a sequence that is spread over ranks is the attention of one device: masks bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rainfusion
from rainfusion.testing import tolerance
from tests.distributed.cases import Case, NearestForSome, Result, on_one_device, on_one_device_in_float64, on_ranks
from tests.distributed.workers import DEVICE, WORLD, Workers

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore::rainfusion.SparsityWarning", "ignore::rainfusion.SpeedWarning"),
]

METHODS = ("ulysses", "gather", "ring", "unified")
# Each has what the others have not; the property test mixes them.
CASES = {
    "text and sink": Case(text=7, sink="first_frame"),
    "shares a head": Case(sparsity=(0.7, 0.2, 0.5, 0.4)),
    "lengths": Case(batch=2, kv_lengths=(64, 61)),
    "lengths beyond the text": Case(batch=2, kv_lengths=(3, 0), sink=None),
    "summary": Case(omitted="summary"),
    "summary and lengths": Case(omitted="summary", batch=2, kv_lengths=(66, 40), sink=None),
    "dense": Case(sparsity=0.0),
    "dense with lengths": Case(sparsity=0.0, batch=2, kv_lengths=(66, 62)),
    "other blocks for keys": Case(block=(8, 4)),
    "bshd and bfloat16": Case(tensor_layout="bshd", dtype="bfloat16", heads=5, kv_heads=5),
    "mass": Case(sparsity=None, policy=rainfusion.TopP(0.6)),
    "mass and shares": Case(sparsity=None, policy=rainfusion.Hybrid((0.8, 0.5, 0.9, 0.7), 0.4)),
    "a policy with a prior a head": Case(sparsity=None, policy=NearestForSome()),
    "quotas": Case(operand="quotas"),
    "a mask with empty rows": Case(operand="mask"),
    "no text": Case(text=0, sink=None),
    "fewer key heads than ranks": Case(kv_heads=1),
    "blocks of 128": Case(grid=(5, 16, 16), text=30, block=128, dtype="float16", head_dim=128),
    "INT8": Case(precision="int8"),
    "FP8, means, rotated": Case(precision="fp8", rotate=True, omitted="summary"),
    "INT8 and lengths": Case(precision="int8", batch=2, kv_lengths=(64, 41), omitted="summary", sink=None),
    "dense FP8": Case(precision="fp8", sparsity=0.0, batch=2, kv_lengths=(66, 62)),
}


def check(case: Case, found: Result) -> None:
    single = on_one_device(case)
    assert np.array_equal(found.mask, single.mask)
    right = on_one_device_in_float64(case, single.mask)
    for name, limit in (("out", tolerance.output_limit), ("lse", tolerance.lse_limit)):
        given_, alone, exact = (getattr(result, name) for result in (found, single, right))
        finite = np.isfinite(exact)
        assert np.array_equal(finite, np.isfinite(given_))
        assert np.array_equal(finite, np.isfinite(alone))
        errors = [np.abs(x[finite] - exact[finite]).max(initial=0.0) for x in (given_, alone)]
        assert errors[0] <= limit(case.computes_in, errors[1], np.abs(exact[finite]).max(initial=0.0)), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_a_case_is_that_of_one_device(workers: Workers, name: str, method: str) -> None:
    case = replace(CASES[name], method=method)
    world = WORLD if method == "unified" else 2 + list(CASES).index(name) % (WORLD - 1)
    for found in workers.results(world, on_ranks, case):
        check(case, found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["text and sink", "summary and lengths", "shares a head", "dense with lengths"])
def test_shards_may_be_balanced(workers: Workers, name: str, method: str) -> None:
    case = replace(CASES[name], method=method, balanced=True, sink="first_frame")
    for found in workers.results(WORLD, on_ranks, case):
        check(case, found)


@pytest.mark.parametrize("world", range(1, WORLD + 1))
def test_ulysses_takes_shards_in_the_order_of_the_sequence(workers: Workers, world: int) -> None:
    case = Case(heads=6, kv_heads=3, uneven=True, sparsity=(0.7, 0.2, 0.5, 0.4, 0.1, 0.3))
    for found in workers.results(world, on_ranks, case):
        check(case, found)


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    grid = draw(st.tuples(st.integers(1, 3), st.integers(3, 6), st.integers(3, 6)))
    text = draw(st.integers(0, 9))
    group, kv_heads, batch = draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.integers(1, 2))
    share = st.floats(0, 0.9)
    heads = group * kv_heads
    length = grid[0] * grid[1] * grid[2] + text
    lengths = st.none() | st.tuples(*[st.integers(length - text, length + 1)] * batch)
    method = draw(st.sampled_from(METHODS))
    return Case(
        method,
        batch,
        heads,
        kv_heads,
        grid,
        text,
        draw(st.sampled_from([2, 3, 4, (4, 2), (2, 4)])),
        draw(share | st.tuples(*[share] * heads)),
        None,
        draw(st.sampled_from([None, "first_frame", "first_frame_keys"])),
        draw(st.sampled_from(["drop", "summary"])),
        draw(lengths),
        draw(st.sampled_from(["bhsd", "bshd"])),
        draw(st.sampled_from(["float32", "bfloat16", "float64"])),
        uneven=method == "ulysses" and draw(st.booleans()),
        balanced=method != "ulysses" and draw(st.booleans()),
        precision=draw(st.sampled_from([None, None, "int8", "fp8"])),
    )


@settings(max_examples=40)
@given(case=any_case(), world=st.integers(1, WORLD))
def test_any_case_is_that_of_one_device(workers: Workers, case: Case, world: int) -> None:
    blocks = -(-case.length // max(case.layout.block))
    if case.method == "unified" and blocks < WORLD:
        case = replace(case, method="ring")
    world = WORLD if case.method == "unified" else min(world, case.heads, blocks)
    for found in workers.results(world, on_ranks, case):
        check(case, found)


def test_shards_may_have_other_lengths_in_every_call(workers: Workers) -> None:
    results = workers.results(2, shards_of, [(30, 37), (40, 27), (30, 37), (20, 47), (40, 27)])
    for found in results:
        assert all(np.array_equal(found[0], other) for other in found)


def shards_of(group: Any, lengths: list[tuple[int, int]]) -> list[np.ndarray]:
    """The output of calls whose shards have these lengths on two ranks."""
    import torch.distributed as dist

    import rainfusion.distributed as rd

    case, rank, outputs = Case(), dist.get_rank(group), []
    for pair in lengths:
        shards = [x.narrow(2, sum(pair[:rank]), pair[rank]) for x in case.tensors()]
        out = rd.attention(*shards, group=group, **case.settings)
        outputs.append(rd.unshard(out, rainfusion.TokenLayout(block=4), group=group).float().cpu().numpy())
    return outputs


@pytest.mark.skipif(WORLD < 4, reason="needs four ranks")
def test_a_device_mesh_is_a_group(workers: Workers) -> None:
    for found in workers.results(4, on_one_of_a_mesh):
        check(Case(heads=2), found)


def on_one_of_a_mesh(_: Any) -> Result:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("copies", "tokens"))
    return on_ranks(mesh["tokens"], Case("ring", heads=2))


def test_heads_are_dealt_by_what_they_keep() -> None:
    from rainfusion.distributed.heads import deal

    assert deal([1] * 5, 2) == ((0, 1, 2), (3, 4))
    assert deal([9, 1, 1, 9, 5, 5], 2) == ((0, 1, 4), (2, 3, 5))
    assert deal([8, 1, 1, 1], 2) == ((0,), (1, 2, 3))


def emulates_aloud(group: Any, method: str) -> list[str]:
    """What a rank is told of a precision."""
    import warnings

    import torch

    import rainfusion.distributed as rd

    x = torch.zeros(1, 4, 8, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settings = {"block": 4, "order": "given", "sparsity": 0.5, "precision": "int8"}
        rd.attention(x, x, x, group=group, method=method, **settings)
    return [str(note.message) for note in said]


@pytest.mark.parametrize("method", ["ulysses", "gather", "ring"])
def test_a_precision_that_is_emulated_is_said(workers: Workers, method: str) -> None:
    for told in workers.results(2, emulates_aloud, method):
        assert len([text for text in told if "no kernels of 8 bits" in text]) == 1


@pytest.mark.parametrize("precision", ["int4", 8])
def test_an_unknown_precision_is_refused(precision: Any) -> None:
    from rainfusion.distributed.functional import _settings

    with pytest.raises(rainfusion.ProblemError, match="is not known; choose one of None, 'int8', 'fp8'"):
        _settings({"precision": precision})
