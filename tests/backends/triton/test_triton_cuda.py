"""What only a CUDA device can show: graphs, compiled code, no waiting, Hopper's kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import rainfusion
from rainfusion import AttentionProblem, BlockMask, Fixed, Hybrid, TokenLayout, TopK, TopP
from rainfusion.backends.triton import hardware
from rainfusion.backends.triton.lowering import Lowered
from rainfusion.core.plan import Plan
from rainfusion.plugins.manager import host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; kernels run interpreted elsewhere"),
    pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SpeedWarning"),  # problems are small here
    pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

GRID = (5, 16, 16)
NUMBERS = ("quotas", "kv_lengths")
SETTINGS = (
    {"sparsity": 0.3},
    {"sparsity": 0.3, "omitted": "summary"},
    {"policy": TopP(0.6)},
    {"policy": Hybrid(0.4, 0.3)},
    {"sparsity": (0.2, 0.3, 0.3, 0.4)},
    {"sparsity": 0.3, "return_lse": True},
    {"sparsity": 0.3, "dtype": torch.float32},
    {"quotas": [[2] * 8], "kv_lengths": [1201], "omitted": "summary"},
    {"sparsity": 0.3, "precision": "int8"},
    {"sparsity": 0.3, "precision": "fp8", "rotate": True, "omitted": "summary", "return_lse": True},
    {"kv_lengths": [1201], "precision": "int8", "return_lse": True},
)
Call = Callable[..., Any]


def tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0, length: int = 1280) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (1, 4, length, 128)
    return [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(3)]


def is_hopper() -> bool:
    return torch.cuda.is_available() and hardware.architecture(torch.device("cuda:0")) == "sm_90"


def prepared(settings: dict[str, Any]) -> tuple[Call, list[torch.Tensor]]:
    if settings.get("precision") and not is_hopper():
        pytest.skip("attention in 8 bits runs by its definition here, which reads the mask on the host")
    dtype = settings.get("dtype", torch.bfloat16)
    arguments = {key: value for key, value in settings.items() if key != "dtype"}
    for name in NUMBERS:
        if name in arguments:
            arguments[name] = torch.tensor(arguments[name], dtype=torch.int32, device="cuda")
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


def test_a_given_mask_is_not_looked_at() -> None:
    q, k, v = tensors()
    _, mask = rainfusion.attention(q, k, v, grid=GRID, sparsity=0.3, backend="triton", return_mask=True)
    rainfusion.attention(q, k, v, grid=GRID, mask=mask, backend="triton")
    with no_waiting():
        rainfusion.attention(q, k, v, grid=GRID, mask=mask, backend="triton")


def test_what_a_graph_reads_outlives_the_executable() -> None:
    """Constants that a graph has captured are kept until somebody lets go of them."""
    call, inputs = prepared({"sparsity": 0.3})
    expected = call(*inputs)
    captured = host().backend("triton").captured
    captured.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs)
    assert len(captured) > 0
    rainfusion.cache.clear()
    torch.cuda.empty_cache()
    torch.full((2**20,), -1, device="cuda", dtype=torch.int32)  # takes freed memory
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


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


@pytest.mark.parametrize("precision", [None, "int8", "fp8"])
def test_the_same_bits_every_time(precision: str | None) -> None:
    """Which program takes which tile is a race; what it computes is not."""
    call, inputs = prepared({"policy": TopP(0.6), "precision": precision})
    expected = call(*inputs)
    assert all(torch.equal(call(*inputs), expected) for _ in range(20))


# -- Hopper's kernel -------------------------------------------------------------------------------------

on_hopper = pytest.mark.skipif(not is_hopper(), reason="no Hopper device")


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
    from rainfusion.backends.triton.hopper import launch

    monkeypatch.setattr(launch, "_outgrows_cache", lambda k, kv_len: ring)
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 40, 900, head_dim, generator=generator, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, 20, kv_len, head_dim, generator=generator, device="cuda", dtype=dtype) for _ in range(2))
    problem = AttentionProblem.from_tensors(q, k, v)
    plan = rainfusion.plan(problem, TokenLayout(), Fixed(), omitted="summary" if means else "drop")
    blocks = torch.rand(2, 40, 8, -(-kv_len // 128), generator=generator, device="cuda") > 0.6
    blocks[:, ::3, 1] = False  # a row that keeps nothing
    ours, plain = on_both_kernels(plan, {"%q": q, "%k": k, "%v": v, "%mask": blocks})
    torch.testing.assert_close(ours[0], plain[0], rtol=2e-2, atol=1e-2 if dtype == torch.bfloat16 else 2e-3)


@on_hopper
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_len", [128, 512, 600, 2563])
@pytest.mark.parametrize("settings", [{}, {"omitted": "summary"}, {"kv_lengths": True}, {"rotate": True}], ids=str)
@pytest.mark.parametrize("ring", [False, True])
def test_eight_bits_are_as_exact_as_their_definition(
    precision: str, head_dim: int, kv_len: int, settings: dict[str, Any], ring: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both against exact attention by the same mask: neither much further from it than the other."""
    from rainfusion.backends.triton.hopper import launch

    monkeypatch.setattr(launch, "_outgrows_cache", lambda k, kv_len: ring)
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 40, 900, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 20, kv_len, head_dim, generator=generator, device="cuda").bfloat16() + 1 for _ in range(2))
    plan = rainfusion.plan(
        AttentionProblem.from_tensors(q, k, v),
        TokenLayout(),
        Fixed(),
        returns=("%out", "%lse"),
        precision=precision,
        **settings,
    )
    blocks = torch.rand(2, 40, 8, -(-kv_len // 128), generator=generator, device="cuda") > 0.6
    blocks[:, ::3, 1] = False  # a row that keeps nothing
    lengths = torch.tensor([kv_len, max(kv_len - 140, 1)], dtype=torch.int32, device="cuda")
    values = {"%q": q, "%k": k, "%v": v, "%mask": blocks, "%kv_lengths": lengths}
    executable = rainfusion.lower(plan, device="cuda:0", backend="triton", strict=True)
    (step,) = executable.steps
    out, lse = (step.run({name: values[name] for name in step.segment.inputs})[name] for name in ("%out", "%lse"))
    exact = {name: x.double() if x.is_floating_point() else x for name, x in values.items()}
    in_64_bits = replace(plan.problem, dtype="float64")
    said = {name: value for name, value in settings.items() if name != "rotate"}
    plain = rainfusion.plan(in_64_bits, TokenLayout(), Fixed(), returns=("%out", "%lse"), **said)
    for defined, known in ((plan, values), (plain, exact)):
        for op in defined.ops:
            if op.reads:
                known.update(op.evaluate(known))
    assert torch.equal(lse.isinf(), exact["%lse"].isinf())
    assert torch.equal(out == 0, exact["%out"] == 0)
    in_16_bits = values["%out"].to(out.dtype)
    error, allowed = (float((x.double() - exact["%out"]).norm()) for x in (out, in_16_bits))
    assert error < 1.2 * allowed
    there = exact["%lse"].isfinite()
    error, allowed = (float((x.double() - exact["%lse"])[there].norm()) for x in (lse, values["%lse"]))
    assert error < 1.3 * allowed


@on_hopper
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_nan_spreads_in_8_bits(precision: str) -> None:
    """From a query to its block, from a key to its head."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, 4, 512, 128, generator=generator, device="cuda").bfloat16() for _ in range(3))
    q[0, 0, 200] = torch.nan
    k[0, 1, 300, 5] = torch.nan
    blocks = torch.ones(1, 4, 4, 4, dtype=torch.bool, device="cuda")
    mask = BlockMask.from_bool(blocks, 512, 512, (128, 128))
    out = first(rainfusion.attention(q, k, v, mask=mask, precision=precision, backend="triton")).float()
    expected = torch.zeros(4, 512, dtype=torch.bool, device="cuda")
    expected[0, 128:256], expected[1] = True, True
    assert torch.equal(out[0].isnan().all(2), expected)
    assert torch.equal(out[0].isnan().any(2), expected)


def on_both_kernels(plan: Plan, values: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Output and log-sum-exp of Hopper's kernel and of the plain one."""
    (step,) = rainfusion.lower(plan, device="cuda:0", backend="triton").steps
    lowered = step.run
    assert isinstance(lowered, Lowered)
    assert str(lowered.kernel) == "Hopper kernel"
    assert lowered.kernel is not None
    results = []
    for both in (lowered, lowered.with_kernel(replace(lowered.kernel, hopper=None))):
        blocks = both.fold(values)
        lists = both.list(values, blocks)
        assert lists is not None
        results.append(both.attend(values, blocks, lists))
    torch.cuda.synchronize()
    return results


@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [(900, 300), (0, 641), (1, 899), (768, 1000)])
@pytest.mark.parametrize("kind", ["mask", "means", "lse", "dense", "keys only"])
def test_both_kernels_agree_on_padded_samples(head_dim: int, lengths: tuple[int, int], kind: str) -> None:
    """Padding holds NaN: keys there take no part, queries there give 0."""
    generator = torch.Generator("cuda").manual_seed(0)
    q_len = 333 if kind == "keys only" else 900
    q = torch.randn(2, 20, q_len, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
    k, v = (
        torch.randn(2, 10, 900, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    for i, length in enumerate(lengths):
        k[i, :, length:], v[i, :, length:] = torch.nan, torch.inf
        if kind != "keys only":
            q[i, :, length:] = torch.nan
    policy = TopK(0.0) if kind == "dense" else Fixed()
    returns = ("%out", "%lse") if kind == "lse" else ("%out",)
    problem = AttentionProblem.from_tensors(q, k, v)
    omitted = "summary" if kind == "means" else "drop"
    plan = rainfusion.plan(problem, TokenLayout(), policy, omitted=omitted, kv_lengths=True, returns=returns)
    blocks = torch.rand(2, 20, -(-q_len // 128), 8, generator=generator, device="cuda") > 0.5
    values = {"%q": q, "%k": k, "%v": v, "%mask": blocks}
    values["%kv_lengths"] = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    (ours, our_lse), (plain, plain_lse) = on_both_kernels(plan, values)
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, plain, rtol=2e-2, atol=1e-2)
    if our_lse is not None:
        torch.testing.assert_close(our_lse, plain_lse, rtol=1e-3, atol=1e-3)
    if kind != "keys only":
        for i, length in enumerate(lengths):
            assert not ours[i, :, length:].any()


@on_hopper
@pytest.mark.parametrize("return_lse", [False, True])
def test_rows_that_keep_nothing_give_zeros(return_lse: bool) -> None:
    q, k, v = tensors()
    q[:, :, 256:384] = torch.nan  # not even then
    blocks = torch.ones(1, 4, 10, 10, dtype=torch.bool, device="cuda")
    blocks[:, :, 2] = False
    mask = BlockMask.from_bool(blocks, 1280, 1280, (128, 128))
    results = rainfusion.attention(q, k, v, mask=mask, backend="triton", return_lse=return_lse)
    out = first(results)
    torch.cuda.synchronize()
    assert not out[:, :, 256:384].any()
    if return_lse:
        assert (results[1][:, :, 256:384] == -np.inf).all()
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
