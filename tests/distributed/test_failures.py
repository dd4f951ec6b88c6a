"""What does not fit is an error on every rank that names the cause; no rank waits for another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import rainfusion
from tests.distributed.workers import Workers, on_the_cpu

pytestmark = [pytest.mark.distributed, on_the_cpu]

LAYOUT = rainfusion.TokenLayout((1, 4, 16), block=4, sink=None)
SETTINGS = {"grid": (1, 4, 16), "block": 4, "sink": None}


def rank_of(group: Any) -> int:
    import torch.distributed as dist

    return dist.get_rank(group)


def tensors(heads: int = 2, tokens: int = 32, **kind: Any) -> list[Any]:
    import torch

    return [torch.ones(1, heads, tokens, 8, **kind)] * 3


def call(group: Any, shards: Any = None, **settings: Any) -> Any:
    import rainfusion.distributed as rd

    return rd.attention(*(shards or tensors()), group=group, **{**SETTINGS, **settings})


def other_sparsity(group: Any) -> Any:
    return call(group, sparsity=0.5 + 0.25 * (rank_of(group) == 1))


def other_method(group: Any) -> Any:
    return call(group, order="given", method="ring" if rank_of(group) else "gather")


def other_heads(group: Any) -> Any:
    return call(group, tensors(heads=2 + 2 * rank_of(group)))


def other_version(group: Any) -> Any:
    from rainfusion.distributed import functional

    before = functional.__version__
    functional.__version__ = f"0.{rank_of(group)}"
    try:
        return call(group)
    finally:
        functional.__version__ = before


def other_operand(group: Any) -> Any:
    return call(group, kv_lengths=[64] if rank_of(group) else None)


def one_fails(group: Any) -> Any:
    return call(group, sparsity=2.0 if rank_of(group) else 0.5)


def one_has_no_tensor(group: Any) -> Any:
    return call(group, (None, None, None) if rank_of(group) else None)


def one_has_no_tokens(group: Any) -> Any:
    return call(group, tensors(tokens=64 - 64 * rank_of(group)))


def one_has_no_backend(group: Any) -> Any:
    return call(group, backend="reference" if rank_of(group) else "nothing")


def too_few_heads(group: Any) -> Any:
    return call(group, tensors(heads=1))


def other_length(group: Any) -> Any:
    return call(group, tensors(tokens=31))


def cut_blocks(group: Any) -> Any:
    return call(group, tensors(tokens=30 + 4 * rank_of(group)), method="gather", order="given")


def other_order(group: Any) -> Any:
    return call(group, method="ring")


def unknown_method(group: Any) -> Any:
    return call(group, method="star")


def unknown_argument(group: Any) -> Any:
    return call(group, sparsty=0.5)


def too_few_blocks(group: Any) -> Any:
    import rainfusion.distributed as rd

    return rd.shard(tensors(tokens=4)[0], rainfusion.TokenLayout(block=4), group=group)


def other_shards(group: Any) -> Any:
    import rainfusion.distributed as rd

    return rd.unshard(tensors(heads=1 + rank_of(group))[0], LAYOUT, group=group)


def one_wants_a_gradient(group: Any) -> Any:
    return call(group, tensors(requires_grad=rank_of(group) == 1))


def a_mesh_of(names: tuple[str, str]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def unified_without_a_mesh(group: Any) -> Any:
    return call(group, method="unified", order="given")


def a_mesh_without_unified(_: Any) -> Any:
    return call(a_mesh_of(("ring", "ulysses")), tensors(tokens=16), method="ring", order="given")


def a_mesh_of_other_names(_: Any) -> Any:
    return call(a_mesh_of(("ulysses", "ring")), tensors(tokens=16), method="unified", order="given")


def one_of_a_mesh_fails(_: Any) -> Any:
    mesh = a_mesh_of(("ring", "ulysses"))
    sparsity = 0.5 + (mesh.get_rank() == 2)
    return call(mesh, tensors(tokens=16), method="unified", order="given", sparsity=sparsity)


def other_balance(group: Any) -> Any:
    return call(group, method="gather", order="given", balanced=rank_of(group) == 1)


def balanced_in_another_order(group: Any) -> Any:
    return call(group, balanced=True)


def balanced_by_hand(group: Any) -> Any:
    return call(group, tensors(tokens=28 + 8 * rank_of(group)), balanced=True, method="ring", order="given")


def no_group(group: Any) -> Any:
    return call("all of them")


def quotas_of_another_shape(group: Any) -> Any:
    return call(group, quotas=[[1, 2, 3]])


def masks_of_another_problem(group: Any) -> Any:
    import torch

    mask = rainfusion.BlockMask(torch.ones(1, 2, 8, 8, dtype=torch.bool), 32, 32, (4, 4))
    return call(group, mask=mask, method="gather", order="given")


MESHES: dict[Callable[[Any], Any], str] = {
    a_mesh_without_unified: "method='ring' was given a group of two dimensions; method='unified' takes",
    a_mesh_of_other_names: "group is a DeviceMesh of ulysses and ring; give one of the two, or a mesh of ring and",
    one_of_a_mesh_fails: "sparsity=1.5",
}
DISAGREE = "the ranks disagree: "
EVERYWHERE: dict[Callable[[Any], Any], str] = {
    other_sparsity: f"{DISAGREE}sparsity is 0.5 on rank 0 and 0.75 on rank 1; policy is TopK",
    other_method: f"{DISAGREE}method is 'gather' on rank 0 and 'ring' on rank 1. Give",
    other_heads: f"{DISAGREE}q, k, v is batch=1 heads=2/2 head_dim=8 float32 on rank 0 and batch=1 heads=4/4",
    other_version: f"{DISAGREE}rainfusion is 0.0 on rank 0 and 0.1 on rank 1. Give",
    other_operand: f"{DISAGREE}kv_lengths is not given on rank 0 and given, int64 (1,) on rank 1. Give",
    too_few_heads: "1 heads cannot be spread over 2 ranks; use at most 1 ranks, or method='gather'",
    other_length: "grid 1x4x16 makes 64 tokens, but q has 62",
    cut_blocks: "q of rank 0 has 30 tokens, which are not whole blocks of 4; make shards with",
    other_order: "method='ring' takes tokens in block order; shard the sequence with",
    unknown_method: "method='star'",
    unknown_argument: "sparsty is not an argument; choose from grid",
    too_few_blocks: "4 tokens are 1 blocks of 4, too few for 2 ranks; use at most 1 ranks",
    other_shards: f"{DISAGREE}x is torch.float32 [1, 1, 8] without axis 2 on rank 0 and",
    unified_without_a_mesh: "method='unified' was given a group of one dimension; method='unified' takes",
    other_balance: f"{DISAGREE}balanced is False on rank 0 and True on rank 1. Give",
    balanced_in_another_order: "balanced=True is about shards in block order; say order='given', too",
    balanced_by_hand: "balanced shards have 32, 32 tokens, not 28, 36; make them with",
    no_group: "group='all of them' is no process group of this process",
    quotas_of_another_shape: "quotas is int64 (1, 3); give integers",
    masks_of_another_problem: "the mask is of another problem",
}
ON_ONE: dict[Callable[[Any], Any], tuple[int, str]] = {
    one_fails: (1, "sparsity=2.0"),
    one_wants_a_gradient: (1, "grad"),
    one_has_no_tensor: (1, "q=None is a NoneType"),
    one_has_no_tokens: (1, "q_len"),
    one_has_no_backend: (0, "nothing"),
}


@pytest.mark.parametrize("function", EVERYWHERE, ids=lambda function: function.__name__)
def test_every_rank_raises(workers: Workers, function: Callable[[Any], Any]) -> None:
    for error in workers(2, function):
        assert isinstance(error, rainfusion.RainfusionError)
        assert EVERYWHERE[function] in str(error)
    assert_still_usable(workers)


@pytest.mark.parametrize("function", MESHES, ids=lambda function: function.__name__)
def test_every_rank_of_a_mesh_raises(workers: Workers, function: Callable[[Any], Any]) -> None:
    for error in workers(4, function):
        assert isinstance(error, rainfusion.RainfusionError)
        assert MESHES[function] in str(error)
    assert_still_usable(workers)


@pytest.mark.parametrize("function", ON_ONE, ids=lambda function: function.__name__)
def test_the_others_learn_why_one_failed(workers: Workers, function: Callable[[Any], Any]) -> None:
    rank, why = ON_ONE[function]
    errors = workers(2, function)
    assert all(isinstance(error, rainfusion.RainfusionError) and why in str(error) for error in errors)
    assert str(errors[1 - rank]).startswith(f"rank {rank} cannot take part in this call: ")
    assert_still_usable(workers)


def assert_still_usable(workers: Workers) -> None:
    assert workers.results(2, shapes) == [(1, 2, 32, 8)] * 2


def shapes(group: Any) -> tuple[int, ...]:
    return tuple(call(group).shape)


def test_without_a_process_group_it_says_what_to_do() -> None:
    pytest.importorskip("torch")
    import rainfusion.distributed as rd

    with pytest.raises(rd.DistributedError, match=r"call torch\.distributed\.init_process_group first"):
        rd.attention(*tensors(), **SETTINGS)


def test_what_is_remembered_for_a_group_ends_with_it(workers: Workers) -> None:
    assert workers.results(4, remembered_of_a_destroyed_group) == [True] * 4


def remembered_of_a_destroyed_group(_: Any) -> bool:
    import gc
    from weakref import ref

    import torch.distributed as dist

    from rainfusion.distributed import functional

    group = dist.new_group([0, 1, 2, 3])
    call(group, tensors(heads=4, tokens=16))
    call(group, tensors(tokens=16), method="ring", order="given")
    held, known = ref(group), ref(functional._prepared[group])
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return held() is None and known() is None


def test_an_equal_mesh_has_groups_of_its_own(workers: Workers) -> None:
    """As after `destroy_process_group` and another `init_process_group`."""
    assert workers.results(4, call_on_two_equal_meshes) == [(1, 2, 16, 8)] * 4


def call_on_two_equal_meshes(_: Any) -> tuple[int, ...]:
    import torch.distributed as dist

    meshes = [a_mesh_of(("ring", "ulysses")) for _ in range(2)]
    assert meshes[0] == meshes[1]
    before, after = ([mesh.get_group(dimension) for dimension in (0, 1)] for mesh in meshes)
    assert not {*before} & {*after}
    out = None
    for mesh, groups in zip(meshes, (before, after), strict=True):
        out = call(mesh, tensors(tokens=16), method="unified", order="given")
        for group in groups:
            dist.destroy_process_group(group)
    return tuple(out.shape)
