"""What only a CUDA device can show: graphs, compiled code, no waiting, Hopper's kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import pytest
import torch

import rainfusion
from rainfusion import AttentionProblem, BlockMask, Fixed, TokenLayout, TopK, TopP
from rainfusion.backends.triton import chip
from rainfusion.backends.triton.lowering import Lowered

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; kernels run interpreted elsewhere"),
    pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SpeedWarning"),  # problems are small here
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

GRID = (5, 16, 16)
SETTINGS = (
    {"sparsity": 0.3},
    {"sparsity": 0.3, "omitted": "summary"},
    {"policy": TopP(0.6)},
    {"sparsity": 0.3, "return_lse": True},
    {"sparsity": 0.3, "dtype": torch.float32},
)
Call = Callable[..., Any]


def tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0, length: int = 1280) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (1, 4, length, 128)
    return [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(3)]


def prepared(settings: dict[str, Any]) -> tuple[Call, list[torch.Tensor]]:
    dtype = settings.get("dtype", torch.bfloat16)
    arguments = {key: value for key, value in settings.items() if key != "dtype"}
    return lambda q, k, v: rainfusion.attention(q, k, v, grid=GRID, backend="triton", **arguments), tensors(dtype)


def first(results: Any) -> torch.Tensor:
    out: torch.Tensor = results[0] if isinstance(results, tuple) else results
    return out


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_waits_for_the_device(settings: dict[str, Any]) -> None:
    call, inputs = prepared(settings)
    call(*inputs)  # planning copies constants
    with no_waiting():
        call(*inputs)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_captured_graph_computes_on_new_numbers(settings: dict[str, Any]) -> None:
    call, inputs = prepared(settings)
    call(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    for seed in (1, 2):
        for x, fresh in zip(inputs, tensors(inputs[0].dtype, seed), strict=True):
            x.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(first(captured), first(call(*inputs)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while its compiler is imported
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_compiled_code_gives_the_same(settings: dict[str, Any]) -> None:
    call, inputs = prepared(settings)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return first(call(q * 2, k, v)) + 1

    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(*inputs)
        torch.testing.assert_close(compiled, model(*inputs))


def test_a_given_mask_in_a_graph() -> None:
    q, k, v = tensors()
    _, mask = rainfusion.attention(q, k, v, grid=GRID, sparsity=0.3, backend="triton", return_mask=True)
    graph = torch.cuda.CUDAGraph()
    rainfusion.attention(q, k, v, grid=GRID, mask=mask, backend="triton")
    with torch.cuda.graph(graph):
        out = rainfusion.attention(q, k, v, grid=GRID, mask=mask, backend="triton")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, rainfusion.attention(q, k, v, grid=GRID, mask=mask, backend="triton"))


def test_the_same_bits_every_time() -> None:
    """Which program takes which tile is a race; what it computes is not."""
    call, inputs = prepared({"policy": TopP(0.6)})
    expected = call(*inputs)
    assert all(torch.equal(call(*inputs), expected) for _ in range(20))


# -- Hopper's kernel -------------------------------------------------------------------------------------

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or chip.architecture(torch.device("cuda:0")) != "sm_90", reason="no Hopper device"
)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_len", [128, 512, 600, 2563])
@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("ring", [False, True])
def test_both_kernels_agree(
    dtype: torch.dtype, head_dim: int, kv_len: int, means: bool, ring: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that keep few blocks, one of them perhaps the ragged one, and more tiles than programs."""
    from rainfusion.backends.triton import attend_hopper

    monkeypatch.setattr(attend_hopper, "_outgrows_cache", lambda k, kv_len: ring)
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 40, 900, head_dim, generator=generator, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, 20, kv_len, head_dim, generator=generator, device="cuda", dtype=dtype) for _ in range(2))
    problem = AttentionProblem.from_tensors(q, k, v)
    plan = rainfusion.plan(problem, TokenLayout(), Fixed(), omitted="summary" if means else "drop")
    blocks = torch.rand(2, 40, 8, -(-kv_len // 128), generator=generator, device="cuda") > 0.6
    blocks[:, :, torch.arange(8), torch.arange(8) % blocks.shape[3]] = True
    (step,) = rainfusion.lower(plan, device="cuda:0", backend="triton").steps
    lowered = step.run
    assert isinstance(lowered, Lowered)
    assert str(lowered._attend) == "Hopper kernel"
    values = {"%q": q, "%k": k, "%v": v}
    folded = lowered.fold(values)
    lists = lowered.list(*folded[:2], blocks)
    ours, _ = lowered.attend(*folded, lists)
    without = copy(lowered)  # lowered plans are kept; other tests may get this one
    without._attend = dataclasses.replace(lowered._attend, hopper=None)
    plain, _ = without.attend(*folded, lists)
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=1e-2 if dtype == torch.bfloat16 else 2e-3)


@on_hopper
def test_rows_emptied_behind_our_back_do_not_hang() -> None:
    q, k, v = tensors()
    blocks = torch.ones(1, 4, 10, 10, dtype=torch.bool, device="cuda")
    mask = BlockMask.from_bool(blocks, 1280, 1280, (128, 128))
    blocks[:, :, 2] = False
    out = rainfusion.attention(q, k, v, mask=mask, backend="triton")
    torch.cuda.synchronize()
    rows = torch.ones(1280, dtype=torch.bool, device="cuda")
    rows[256:384] = False
    dense = rainfusion.attention(q, k, v, sparsity=0.0, backend="triton")
    torch.testing.assert_close(out[:, :, rows], dense[:, :, rows], rtol=2e-2, atol=1e-2)


@on_hopper
def test_long_first_frames_and_many_heads() -> None:
    """Heavy tiles first, thousands of tiles after them; against torch's own attention under the same mask."""
    q, k, v = (torch.randn(1, 8, 8 * 32 * 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    plan_arguments = {"grid": (8, 32, 32), "backend": "triton"}
    out, mask = rainfusion.attention(q, k, v, sparsity=0.7, return_mask=True, **plan_arguments)
    layout = TokenLayout((8, 32, 32))
    order = torch.tensor(layout.order, device="cuda")
    dense = mask.blocks[:, :4].repeat_interleave(128, 2).repeat_interleave(128, 3)
    ordered = (x[:, :4, order] for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*ordered, attn_mask=dense)
    torch.testing.assert_close(out[:, :4, order], expected, rtol=2e-2, atol=1e-2)
    assert mask.sparsity == rainfusion.plan(AttentionProblem.from_tensors(q, k, v), layout, TopK(0.7)).sparsity
