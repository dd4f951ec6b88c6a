"""torch.compile over rainfusion: one operator in the graph, the same numbers."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rainfusion
from rainfusion import AttentionProblem, BlockMask, TokenLayout, TopK, TopP, api
from rainfusion.core.errors import MaskError

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


NO_MASK = (None, [], [], "", False)


def test_operators_keep_torchs_rules() -> None:
    run = executable("%out", "%lse")
    torch.library.opcheck(torch.ops.rainfusion.run.default, (*tensors(), *NO_MASK, run.key))


def test_a_mask_cannot_leave_the_graph() -> None:
    with pytest.raises(Exception, match="cannot leave a traced graph"):
        compiled(lambda *x: attention(*x, sparsity=0.3, return_mask=True))(*tensors())
    with pytest.raises(Exception, match="cannot leave a traced graph"):
        compiled(executable("%out", "%mask"))(*tensors())


def test_a_mask_in_another_order_is_refused_in_a_graph_too() -> None:
    _, mask = attention(*tensors(), sparsity=0.3, window=(1, 8, 8), return_mask=True)
    traced = compiled(lambda q, k, v, mask: attention(q, k, v, mask=mask, window=(1, 4, 16)))
    with pytest.raises(MaskError, match="another order"):
        traced(*tensors(), mask)


def test_a_mask_of_another_length_is_refused_in_a_graph_too() -> None:
    mask = BlockMask.from_bool(torch.ones(1, 2, 8, 8, dtype=torch.bool), 512, 512, (64, 64))
    traced = compiled(lambda q, k, v, mask: rainfusion.attention(q, k, v, mask=mask, block=128, backend="torch"))
    with pytest.raises(MaskError, match="another problem"):
        traced(*tensors(1024), mask)


def test_a_checked_mask_is_not_checked_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    _, mask = attention(*tensors(), sparsity=0.3, return_mask=True)
    traced = compiled(lambda q, k, v, mask: attention(q, k, v, mask=mask))
    monkeypatch.setattr(BlockMask, "_refuse_empty_rows", lambda self: pytest.fail("waits for the device"))
    traced(*tensors(), mask)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policy": "topk"}, "not a policy"),
        ({"mask": 7}, "give a BlockMask"),
        ({"block": (64, 7, 64)}, "not a tuple of 2"),
    ],
)
def test_what_is_refused_is_refused_in_a_graph_too(wrong: dict[str, Any], said: str) -> None:
    settings = {"grid": GRID, "backend": "torch", **wrong}
    with pytest.raises(Exception, match=said):
        compiled(lambda *x: rainfusion.attention(*x, **settings))(*tensors())


def test_a_call_while_another_thread_exports_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export raises torch's flag for the whole process, also for threads that trace nothing."""
    expected = attention(*tensors(), sparsity=0.3)
    run, expected_of_run = executable("%out"), executable("%out")(*tensors())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(attention(*tensors(), sparsity=0.3), expected)
    assert torch.equal(run(*tensors()), expected_of_run)


def test_a_graph_may_outlive_its_executable() -> None:
    run = executable("%out")
    key, expected = run.key, run(*tensors())
    api._lower.cache_clear()
    del run
    gc.collect()
    (out,) = torch.ops.rainfusion.run(*tensors(), *NO_MASK, key)
    assert torch.equal(out, expected)


def test_an_exported_graph_computes_the_same_plan_elsewhere(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = executable_of_model(q, k, v) + 1
            return made

    executable_of_model = executable("%out")
    q, k, v = tensors()
    torch.export.save(torch.export.export(Model(), (q, k, v), strict=False), tmp_path / "graph.pt2")
    torch.save((q, k, v, Model()(q, k, v)), tmp_path / "tensors.pt")
    elsewhere = (
        "import sys, torch, rainfusion, rainfusion.traced\n"
        "q, k, v, expected = torch.load(sys.argv[2])\n"
        "rainfusion.attention(q, k, v, sparsity=0.0, backend='torch')\n"  # other plans come first there
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(q, k, v), expected)\n"
    )
    files = (str(tmp_path / "graph.pt2"), str(tmp_path / "tensors.pt"))
    subprocess.run([sys.executable, "-c", elsewhere, *files], check=True)
