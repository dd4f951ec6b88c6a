"""A tiny Wan whose sequence diffusers splits over two processes computes what one process computes."""

from __future__ import annotations

from dataclasses import replace
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


def joint(name: str) -> tuple[Any, Any]:
    """A tiny model whose sequence has several parts, and a forward's arguments; text of 11 tokens splits unevenly."""
    from tests.integrations.diffusers import test_flux, test_flux2, test_helios, test_minimax_h3, test_qwen_image

    flux, helios, qwen = test_flux.FAMILIES["Flux"], test_helios, test_qwen_image
    images, pooled = ((16, 16), (8, 8)), {"pooled_projections": test_flux.pooled}
    return {
        "Flux": lambda: (flux, test_flux.inputs((16, 16), text=12, **pooled)),
        "Flux and a reference": lambda: (flux, test_flux.inputs(*images, text=12, batch=2, **pooled)),
        "Flux, uneven": lambda: (flux, test_flux.inputs((16, 16), text=11, **pooled)),
        "Flux 2": lambda: (test_flux2.FLUX2, test_flux2.inputs(*images)),
        "Qwen-Image": lambda: (qwen.QWEN, qwen.inputs(*images, text=12)),
        "Qwen-Image, padded text": lambda: (qwen.QWEN, qwen.inputs((12, 14), batch=3, valid=[11, 4, 7])),
        "MiniMax-H3": lambda: (test_minimax_h3.FAMILY, next(iter(test_minimax_h3.FAMILY.inputs.values()))),
        # diffusers' plan for Helios names 40 layers.
        "Helios": lambda: (replace(helios.HELIOS, make=helios.make(num_layers=40)), helios.HELIOS.inputs["video"]),
    }[name]()


def forward_of_joint(_: Any, name: str, sparsity: float, degrees: dict[str, Any], compiled: bool = False) -> Any:
    """The output of one forward, and the kinds of its attention calls."""
    import torch

    from rainfusion.integrations.diffusers import apply_rainfusion
    from tests.integrations.diffusers.families import seeded

    tiny, arguments = joint(name)
    model = tiny.made()
    handle = apply_rainfusion(model, **{**SETTINGS, "block": 16, "sink": None, "sparsity": sparsity})
    if degrees:
        split(model, **degrees)
    if compiled:
        model.compile(backend="aot_eager")
    with torch.no_grad():
        out = model(**seeded(arguments), return_dict=False)
    return out[0].numpy(), [(row.layer, row.kind, row.why) for row in handle.report().rows]


def of_unknown_parts(_: Any) -> Any:
    from unittest import mock

    from rainfusion.integrations.diffusers import adapter

    own = replace(adapter._ADAPTERS["FluxTransformer2DModel"], split="")
    with mock.patch.dict(adapter._ADAPTERS, FluxTransformer2DModel=own):
        return forward_of_joint(None, "Flux", 0.5, {"ulysses_degree": 2})


EVEN, ANYTHING = {"ulysses_degree": 2}, {"ulysses_degree": 2, "ulysses_anything": True}
JOINT = {
    "Flux": EVEN,
    "Flux and a reference": EVEN,
    "Flux, uneven": ANYTHING,
    "Flux 2": ANYTHING,
    "Qwen-Image": EVEN,
    "Qwen-Image, padded text": ANYTHING,
    "MiniMax-H3": ANYTHING,
    "Helios": ANYTHING,
}


@pytest.mark.parametrize("name", JOINT)
def test_two_processes_compute_what_one_does_with_text(workers: Workers, name: str) -> None:
    right, kinds = forward_of_joint(None, name, 0.6, {})
    dense, _ = forward_of_joint(None, name, 0.0, {})
    assert "sparse" in {kind for _, kind, _ in kinds}
    assert not np.allclose(right, dense, atol=1e-4)
    for output, their_kinds in workers.results(4, forward_of_joint, name, 0.6, JOINT[name]):
        assert their_kinds == kinds
        np.testing.assert_allclose(output, right, atol=5e-5 * np.abs(right).max())


def test_compiled_with_text_it_computes_the_same(workers: Workers) -> None:
    right, _ = forward_of_joint(None, "Flux", 0.6, {})
    for output, _ in workers.results(4, compiled_joint):
        np.testing.assert_allclose(output, right, atol=5e-5 * np.abs(right).max())


def compiled_joint(_: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about what it traces
        return forward_of_joint(None, "Flux", 0.6, EVEN, compiled=True)


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
    ("function", "why"),
    [
        (with_gradient, "a gradient is wanted of a sequence"),
        (of_unknown_parts, "it is not known how context parallelism splits the sequence of FluxTransformer2DModel"),
    ],
)
def test_what_cannot_be_split_is_refused(workers: Workers, function: Any, why: str) -> None:
    for error in workers(4, function):
        assert isinstance(error, ProblemError)
        assert why in str(error)


@pytest.mark.parametrize(
    ("streams", "length", "tokens"), [((12, 256), 268, 130), ((12, 256), 300, 150), ((None,), 9, 4)]
)
def test_another_split_than_diffusers_plan_is_refused(streams: Any, length: int, tokens: int) -> None:
    from rainfusion.integrations.diffusers.streams import Split, shards_of

    with pytest.raises(ProblemError, match=rf"device 0 of 2 has {tokens} of {length} tokens, and rainfusion expects"):
        shards_of(streams, length, Split(0, 2, 2, 0, tokens))


def test_text_and_images_of_all_devices_are_put_in_their_places() -> None:
    import torch

    from rainfusion.integrations.diffusers.streams import Split, shards_of

    shards = shards_of((None, 8), 11, Split(0, 2, 2, 0, 6))
    arrived = torch.tensor([0, 1, 3, 4, 5, 6, 2, 7, 8, 9, 10])
    assert shards.to_sequence(arrived, 0).tolist() == [*range(11)]
    assert torch.equal(shards.to_ranks(torch.arange(11), 0), arrived)
