"""A tiny Wan whose sequence diffusers splits over two processes computes what one process computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")

from rainfusion import ProblemError
from tests.distributed.workers import Workers, on_the_cpu

pytestmark = [pytest.mark.distributed, on_the_cpu]

SETTINGS = {"block": 8, "min_blocks": 0, "sparsity": 0.5}
BY_HEAD = {**SETTINGS, "sparsity": (0.7, 0.3, 0.1, 0.5)}
KEPT = {**SETTINGS, "refresh_every": 2}


def model(**settings: Any) -> Any:
    import torch
    from diffusers import WanTransformer3DModel

    from tests.integrations.diffusers.pipelines import TINY

    torch.manual_seed(0)
    return WanTransformer3DModel(**TINY | {"num_attention_heads": 4} | settings).eval()


def forward(model: Any, step: int = 0, frames: int = 3) -> np.ndarray:
    import torch

    generator = torch.Generator().manual_seed(step)
    video = torch.randn(1, 4, frames, 16, 16, generator=generator)
    text = torch.randn(1, 7, 16, generator=generator)
    with torch.no_grad():
        return model(video, torch.full((1,), 900 - step), text, return_dict=False)[0].numpy()


def split(model: Any, **degrees: Any) -> None:
    """Context parallelism as on accelerators; diffusers counts the devices of one, and a CPU has none."""
    from unittest import mock

    import torch
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    world = max(degrees.get("ulysses_degree", 1), degrees.get("ring_degree", 1))
    shape = (degrees.get("ring_degree", 1), degrees.get("ulysses_degree", 1), 4 // world)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses", "copies"))
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(mesh=mesh, **degrees))


def sparse(_: Any, settings: dict[str, Any], order: str, degrees: dict[str, Any], **kind: Any) -> Any:
    """Outputs of three steps, and the kinds of attention calls."""
    from rainfusion.integrations.diffusers import apply_rainfusion

    tiny = model(**kind)
    if order == "split first":
        split(tiny, **degrees)
    handle = apply_rainfusion(tiny, **settings)
    if order == "apply first":
        split(tiny, **degrees)
    outputs = [forward(tiny, step) for step in range(3)]
    return outputs, [(row.layer, row.kind) for row in handle.report().rows]


def compiled(_: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """One forward, the same compiled, and how many attention calls were sparse."""
    import warnings

    from rainfusion.integrations.diffusers import apply_rainfusion

    tiny = model()
    handle = apply_rainfusion(tiny, **SETTINGS)
    split(tiny, ulysses_degree=2)
    before = forward(tiny)
    tiny.compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what it traces
        after = forward(tiny)
    return before, after, [row.kind for row in handle.report().rows].count("sparse")


def removed(_: Any) -> np.ndarray:
    from rainfusion.integrations.diffusers import apply_rainfusion

    tiny = model()
    with apply_rainfusion(tiny, **SETTINGS):
        split(tiny, ulysses_degree=2)
    return forward(tiny)


def with_gradient(_: Any) -> Any:
    import torch

    from rainfusion.integrations.diffusers import apply_rainfusion

    tiny = model()
    apply_rainfusion(tiny, **SETTINGS)
    split(tiny, ulysses_degree=2)
    return tiny(torch.randn(1, 4, 3, 16, 16), torch.full((1,), 900), torch.randn(1, 7, 16))


def with_text(_: Any) -> Any:
    import torch

    from rainfusion.integrations.diffusers import apply_rainfusion
    from tests.integrations.diffusers.test_flux import FAMILIES

    flux = FAMILIES["Flux"]
    tiny = flux.made()
    apply_rainfusion(tiny, **SETTINGS)
    split(tiny, ulysses_degree=2)
    with torch.no_grad():
        return tiny(**flux.inputs["image"]())


@pytest.mark.parametrize("settings", [SETTINGS, BY_HEAD, KEPT], ids=["one share", "shares a head", "masks kept"])
@pytest.mark.parametrize("order", ["split first", "apply first"])
def test_two_processes_compute_what_one_does(workers: Workers, settings: dict[str, Any], order: str) -> None:
    right, kinds = sparse(None, settings, "never split", {})
    assert {kind for _, kind in kinds} >= {"sparse"}
    for outputs, their_kinds in workers.results(4, sparse, settings, order, {"ulysses_degree": 2}):
        assert their_kinds == kinds
        for output, expected in zip(outputs, right, strict=True):
            np.testing.assert_allclose(output, expected, atol=2e-5 * np.abs(expected).max())
    assert not np.allclose(right[0], forward(model()), atol=1e-3)


def test_uneven_heads_in_the_mode_for_anything(workers: Workers) -> None:
    kind = {"num_attention_heads": 3}
    settings = {**SETTINGS, "sparsity": (0.7, 0.3, 0.1)}
    right, _ = sparse(None, settings, "never split", {}, **kind)
    degrees = {"ulysses_degree": 2, "ulysses_anything": True}
    for outputs, _ in workers.results(4, sparse_of_three_heads, settings, degrees):
        np.testing.assert_allclose(outputs, right, atol=2e-5 * np.abs(right).max())


def sparse_of_three_heads(group: Any, settings: dict[str, Any], degrees: dict[str, Any]) -> Any:
    return sparse(group, settings, "apply first", degrees, num_attention_heads=3)


def test_compiled_it_computes_the_same(workers: Workers) -> None:
    for before, after, sparse_calls in workers.results(4, compiled):
        np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())
        assert sparse_calls == 6  # 3 layers, twice


def test_a_sequence_split_meanwhile_stays_split(workers: Workers) -> None:
    expected = forward(model())
    for output in workers.results(4, removed):
        np.testing.assert_allclose(output, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("order", ["split first", "apply first"])
def test_a_ring_is_refused(workers: Workers, order: str) -> None:
    for error in workers(4, sparse, SETTINGS, order, {"ring_degree": 2}):
        assert isinstance(error, ProblemError)
        assert "configure ContextParallelConfig(ulysses_degree=...) without ring_degree" in str(error)


@pytest.mark.parametrize(
    ("function", "why"), [(with_gradient, "a gradient is wanted of a sequence"), (with_text, "not one with text")]
)
def test_what_cannot_be_split_is_refused(workers: Workers, function: Any, why: str) -> None:
    for error in workers(4, function):
        assert isinstance(error, ProblemError)
        assert why in str(error)
