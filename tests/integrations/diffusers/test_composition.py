"""rainfusion together with what else is done to a pipeline: caches, offloading, LoRA, quantisation, other packages."""

from __future__ import annotations

import accelerate
import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import SeaCacheConfig, apply_group_offloading
from peft import LoraConfig

from rainfusion.core.errors import RainfusionWarning
from rainfusion.integrations.diffusers import REST, Adapter, Grid, apply_rainfusion, register_adapter
from tests.integrations.diffusers.families import seeded
from tests.integrations.diffusers.pipelines import LAYERS, inputs, kinds, run, settings, wan, wan_pipeline

STEPS = 5
ALL_KEPT = 1e-9  # sparse attention that keeps every block


pytestmark = pytest.mark.usefixtures("as_pipelines_run")


# -- caches --------------------------------------------------------------------------------------------

CACHES = {
    "sea": lambda pipe: SeaCacheConfig(threshold=9.0),
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),  # it cannot skip before it has seen two steps
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "mag": lambda pipe: MagCacheConfig(
        threshold=0.5, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
    "taylor": lambda pipe: TaylorSeerCacheConfig(  # its own patterns match no attention of Wan
        cache_interval=2, disable_cache_before_step=1, cache_identifiers=[r"^blocks\.\d+\.attn1$"]
    ),
    "taylor, lite": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, use_lite_mode=True
    ),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_caches(cache, when):
    """The same as the cache alone where all blocks are kept; hoisted as in layers; and gone when it is disabled."""
    alone = wan_pipeline()
    alone.transformer.enable_cache(CACHES[cache](alone))
    expected = run(alone, STEPS)
    outputs = {}
    for name, given in {
        "all kept": settings(sparsity=ALL_KEPT),
        "whole": settings(sparsity=0.6),
        "by layer": settings(sparsity=0.6, order="layer"),
    }.items():
        pipe = wan_pipeline()
        if when == "before":
            pipe.transformer.enable_cache(CACHES[cache](pipe))
        handle = apply_rainfusion(pipe, given)
        if when == "after":
            pipe.transformer.enable_cache(CACHES[cache](pipe))
        outputs[name] = run(pipe, STEPS)
        report = handle.report()
        assert report.count(kind="sparse") > 0
        assert report.count(kind="skipped") > 0
        assert report.count() == 2 * STEPS * LAYERS
    torch.testing.assert_close(outputs["all kept"], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs["whole"], outputs["by layer"], rtol=1e-3, atol=1e-4)
    assert torch.equal(run(pipe, STEPS), outputs["by layer"])  # a second run
    pipe.transformer.disable_cache()
    uncached = wan_pipeline()
    apply_rainfusion(uncached, settings(sparsity=0.6, order="layer"))
    assert torch.equal(run(pipe, STEPS), run(uncached, STEPS))
    handle.remove()
    assert torch.equal(run(pipe, STEPS), run(wan_pipeline(), STEPS))


def test_a_cache_outlives_rainfusion():
    alone, pipe = wan_pipeline(), wan_pipeline()
    for one in (alone, pipe):
        one.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    apply_rainfusion(pipe, settings()).remove()
    assert torch.equal(run(pipe), run(alone))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # of cache_dit
@pytest.mark.parametrize("when", ["before", "after"])
def test_cache_dit(when):
    import cache_dit

    def cached(pipe):
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=0.9
            ),
        )

    alone = wan_pipeline()
    cached(alone)
    expected = run(alone, STEPS)
    pipe = wan_pipeline()
    if when == "before":
        cached(pipe)
    handle = apply_rainfusion(pipe, settings(sparsity=ALL_KEPT))
    if when == "after":
        cached(pipe)
    torch.testing.assert_close(run(pipe, STEPS), expected, rtol=1e-3, atol=1e-4)
    assert handle.report().count(kind="sparse") > 0
    assert handle.report().count(kind="skipped") > 0
    cache_dit.disable_cache(pipe)
    handle.remove()
    assert torch.equal(run(pipe, STEPS), run(wan_pipeline(), STEPS))


# -- weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_fused_projections(when):
    model = wan()
    apply_rainfusion(model, settings())
    expected = model(**inputs())[0]
    fused = wan()
    if when == "before":
        fused.fuse_qkv_projections()
    handle = apply_rainfusion(fused, settings())
    if when == "after":
        fused.fuse_qkv_projections()
    torch.testing.assert_close(fused(**inputs())[0], expected, rtol=1e-4, atol=1e-5)
    fused.unfuse_qkv_projections()
    assert torch.equal(fused(**inputs())[0], expected)
    assert kinds(handle.report()) == ["sparse", "sparse"]


def lora(model):
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), "test")


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when):
    alone = wan()
    lora(alone)
    expected = alone(**inputs())[0]
    model = wan()
    if when == "before":
        lora(model)
    handle = apply_rainfusion(model, settings(sparsity=ALL_KEPT))
    if when == "after":
        lora(model)
    torch.testing.assert_close(model(**inputs())[0], expected)
    assert not torch.allclose(expected, wan()(**inputs())[0])
    model.delete_adapters("test")
    torch.testing.assert_close(model(**inputs())[0], wan()(**inputs())[0])
    assert kinds(handle.report()) == ["sparse", "sparse"]
    model.unload_lora()
    handle.remove()
    assert torch.equal(model(**inputs())[0], wan()(**inputs())[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of torchao
@pytest.mark.parametrize("when", ["before", "after"])
def test_quantised_weights(when):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    alone, model = wan(), wan()
    quantize_(alone, Int8WeightOnlyConfig())
    expected = alone(**inputs())[0]
    if when == "before":
        quantize_(model, Int8WeightOnlyConfig())
    handle = apply_rainfusion(model, settings(sparsity=ALL_KEPT))
    if when == "after":
        quantize_(model, Int8WeightOnlyConfig())
    torch.testing.assert_close(model(**inputs())[0], expected)
    assert kinds(handle.report()) == ["sparse"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting(when):
    def cast(model):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    alone, model = wan(), wan()
    cast(alone)
    if when == "before":
        cast(model)
    handle = apply_rainfusion(model, settings(sparsity=ALL_KEPT))
    if when == "after":
        cast(model)
    torch.testing.assert_close(model(**inputs())[0], alone(**inputs())[0], rtol=1e-4, atol=1e-5)
    assert kinds(handle.report()) == ["sparse"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = wan().to(dtype)
    given = {n: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for n, x in inputs().items()}
    expected = model(**given)[0]
    apply_rainfusion(model, settings(sparsity=ALL_KEPT))
    out = model(**given)[0]
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


# -- offloading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloading_whose_hooks_are_put_on_again_after_every_run(when):
    """As `maybe_free_model_hooks` does where `enable_model_cpu_offload` was called."""

    def offload(model):
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        return accelerate.cpu_offload_with_hook(model, torch.device("cpu"))

    plain = wan_pipeline()
    apply_rainfusion(plain, settings(dense_steps=(1, 0)))
    expected = run(plain)
    pipe = wan_pipeline()
    if when == "before":
        offload(pipe.transformer)
    handle = apply_rainfusion(pipe, settings(dense_steps=(1, 0)))
    for _ in range(3):
        offload(pipe.transformer)
        assert torch.equal(run(pipe), expected)
    assert kinds(handle.report(), context="cond") == ["dense", "sparse", "sparse", "sparse"] * 3
    handle.remove()
    assert torch.equal(run(pipe), run(wan_pipeline()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_accelerate_on_every_module(when):
    def hook(model):
        for module in model.modules():
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook(), append=True)

    model = wan()
    if when == "before":
        hook(model)
    apply_rainfusion(model, settings(sparsity=ALL_KEPT))
    if when == "after":
        hook(model)
    torch.testing.assert_close(model(**inputs())[0], wan()(**inputs())[0])
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(**inputs())[0], wan()(**inputs())[0])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(when, kind):
    def offload(model):
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(model, torch.device("cpu"), offload_type=kind, **blocks)

    model = wan()
    if when == "before":
        offload(model)
    handle = apply_rainfusion(model, settings(sparsity=ALL_KEPT))
    if when == "after":
        offload(model)
    for _ in range(2):
        torch.testing.assert_close(model(**inputs())[0], wan()(**inputs())[0])
    assert kinds(handle.report()) == ["sparse"] * 2


# -- a model that calls torch's own function -----------------------------------------------------------


def cogvideo():
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    ).eval()


def cog_inputs(frames=3, height=8, width=8):
    return {
        "hidden_states": torch.randn(1, frames, 4, 2 * height, 2 * width),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": tuple(torch.randn(frames * height * width, 32) for _ in range(2)),
        "return_dict": False,
    }


def cog_parts(model, arguments):
    _, frames, _, height, width = arguments["hidden_states"].shape
    return REST, Grid(frames, height // 2, width // 2)


@pytest.fixture
def cog(own_adapters):
    """A tiny CogVideoX, and an adapter for it."""
    layers = r"transformer_blocks\.\d+\.attn1"
    register_adapter("CogVideoXTransformer3DModel", Adapter(layers, cog_parts, call="sdpa"))
    return cogvideo()


def test_processors_that_call_torch(cog):
    arguments = seeded(cog_inputs)
    before = cog(**arguments)[0]
    with apply_rainfusion(cog, settings(sparsity=ALL_KEPT)) as handle:
        torch.testing.assert_close(cog(**arguments)[0], before)
        assert kinds(handle.report()) == ["sparse"]
    with apply_rainfusion(cog, settings()):
        assert not torch.allclose(cog(**arguments)[0], before)
    with apply_rainfusion(cog, settings(sparsity=0)) as handle:
        torch.testing.assert_close(cog(**arguments)[0], before)
        assert kinds(handle.report()) == ["dense"]
    assert torch.equal(cog(**arguments)[0], before)


def test_fused_projections_that_replace_the_processor_are_noticed(cog):
    """CogVideoX swaps its processors at that; before rainfusion is applied that is no matter."""
    arguments = seeded(cog_inputs)
    apply_rainfusion(cog, settings())
    expected = cog(**arguments)[0]
    fused = cogvideo()
    fused.fuse_qkv_projections()
    apply_rainfusion(fused, settings())
    torch.testing.assert_close(fused(**arguments)[0], expected)
    cog.fuse_qkv_projections()
    with pytest.warns(RainfusionWarning, match="no longer call rainfusion and are dense"):
        cog(**arguments)


@pytest.mark.parametrize("cache", ["first block", "pyramid"])
def test_caches_of_processors_that_call_torch(cog, cache):
    arguments = seeded(cog_inputs)
    pipe = type("Pipe", (), {"current_timestep": 500})
    config = FirstBlockCacheConfig(threshold=0.5) if cache == "first block" else CACHES["pyramid"](pipe)
    cog.enable_cache(config)
    handle = apply_rainfusion(cog, settings())
    for step in range(3):
        with cog.cache_context("cond", step_index=step):
            cog(**arguments)
    assert "skipped" in kinds(handle.report(), layer=0 if cache == "pyramid" else 1)
