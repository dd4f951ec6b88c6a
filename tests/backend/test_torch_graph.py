"""torch.compile over rainfusion: one operator in the graph, the same numbers."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import rainfusion
from rainfusion import AttentionProblem, BlockMask, TokenLayout, TopK, TopP
from rainfusion.core.errors import ProblemError

GRID, BLOCK = (4, 8, 16), 64
# Tracing, functionalisation and fakes as in real use, but no C++ compiler.
compiled: Any = torch.compile(backend="aot_eager", fullgraph=True)


def tensors(length: int = 512, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, 2, length, 32, generator=generator).to(dtype) for _ in range(3)]


def attention(*tensors: torch.Tensor, **settings: Any) -> Any:
    return rainfusion.attention(*tensors, grid=GRID, block=BLOCK, backend="torch", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.3},
        {"policy": TopK(0.4, "paper")},
        {"policy": TopP(0.5, floor=0.2)},
        {"sparsity": 0.3, "return_lse": True, "omitted": "summary", "sink": None, "scale": 0.2},
    ],
    ids=str,
)
def test_attention_is_traced_whole(settings: dict[str, Any]) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(q * 2, k, v, **settings)

    traced, eager = compiled(model)(*tensors()), model(*tensors())
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (traced, eager)), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_tokens_before_heads() -> None:
    q, k, v = (x.transpose(1, 2).contiguous() for x in tensors())
    arguments = {"sparsity": 0.3, "tensor_layout": "bshd", "return_lse": True}
    out, lse = compiled(lambda *x: attention(*x, **arguments))(q, k, v)
    assert torch.equal(out, attention(q, k, v, **arguments)[0])
    assert lse.shape == (1, 2, 512)


def test_lengths_may_be_dynamic() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = rainfusion.attention(q, k, v, sparsity=0.3, block=BLOCK, backend="torch") + 1
        return made

    traced = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (512, 700, 900):
        assert torch.equal(traced(*tensors(length)), model(*tensors(length)))


def executable(*returns: str) -> rainfusion.Executable:
    plan = rainfusion.plan(
        AttentionProblem(1, 2, 512, 512, 32), TokenLayout(GRID, block=BLOCK), TopK(0.3), returns=returns
    )
    return rainfusion.lower(plan, backend="torch")


@pytest.mark.parametrize("returns", [("%out",), ("%lse",), ("%out", "%lse")], ids=str)
def test_a_lowered_plan_is_traced(returns: tuple[str, ...]) -> None:
    run = executable(*returns)
    traced, eager = compiled(run)(*tensors()), run(*tensors())
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (traced, eager)), strict=True):
        assert torch.equal(a, b)


def test_a_given_mask_is_an_input_of_the_graph() -> None:
    _, mask = attention(*tensors(), sparsity=0.3, return_mask=True)
    other = BlockMask.from_bool(torch.ones_like(mask.blocks), 512, 512, (BLOCK, BLOCK))
    traced = compiled(lambda q, k, v, mask: attention(q, k, v, mask=mask))
    for given in (mask, other):
        assert torch.equal(traced(*tensors(), given), attention(*tensors(), mask=given))


def test_operators_keep_torchs_rules() -> None:
    run = executable("%out", "%lse")
    torch.library.opcheck(torch.ops.rainfusion.run.default, (*tensors(), None, run.key))


def test_a_mask_cannot_leave_the_graph() -> None:
    with pytest.raises(Exception, match="cannot leave a traced graph"):
        compiled(lambda *x: attention(*x, sparsity=0.3, return_mask=True))(*tensors())
    run = executable("%out", "%mask")
    with pytest.raises(Exception, match="cannot leave a traced graph"):
        compiled(run)(*tensors())


def test_a_graph_may_outlive_its_executable_only_with_an_error() -> None:
    run = executable("%out")
    key = run.key
    rainfusion.api._lower.cache_clear()
    del run
    gc.collect()
    with pytest.raises(ProblemError, match="no longer there"):
        torch.ops.rainfusion.run(*tensors(), None, key)
