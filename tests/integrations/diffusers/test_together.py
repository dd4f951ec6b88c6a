"""Features of diffusers beside rainfusion, on a tiny Wan pipeline: results are those of rainfusion alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from rainfusion.integrations.diffusers import RainFusionConfig, apply_rainfusion

CONFIG = RainFusionConfig(sparsity=0.5, dense_steps=(1, 0), refresh_every=2, block=16, min_blocks=0, sink=None)
LAYERS, STEPS = 3, 4


def pipeline():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=LAYERS,
    ).eval()  # fmt: skip
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=5.0), transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe):
    text = torch.ones(1, 7, 16), torch.zeros(1, 7, 16)
    return pipe(
        prompt_embeds=text[0], negative_prompt_embeds=text[1], height=128, width=128, num_frames=9,
        num_inference_steps=STEPS, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


def together(feature, is_before):
    """Two runs with a feature, enabled before rainfusion is applied or after, and the report."""
    pipe = pipeline()
    if is_before:
        feature(pipe.transformer)
    with apply_rainfusion(pipe, CONFIG) as handle:
        if not is_before:
            feature(pipe.transformer)
        frames = run(pipe), run(pipe)
    return frames, handle.report()


def nothing(transformer):
    pass


def fused(transformer):
    transformer.fuse_qkv_projections()


def offloaded(transformer):
    transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def compiled(transformer):
    torch.compiler.reset()
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")


def adapted(transformer):
    """LoRA whose second matrix is zero, as it is at first."""
    peft = pytest.importorskip("peft")
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"]))


def cached(transformer):
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))


@pytest.mark.filterwarnings("ignore")  # of peft, accelerate and torch's compiler
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("feature", [fused, offloaded, compiled, adapted])
def test_the_result_is_that_of_rainfusion(feature, is_before):
    (expected, _), plain = together(nothing, is_before=True)
    (first, second), report = together(feature, is_before)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert [row._replace(ms=None) for row in report.rows] == [row._replace(ms=None) for row in plain.rows]


@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
def test_a_cache_skips_layers_and_the_others_stay_sparse(is_before):
    (first, second), report = together(cached, is_before)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    assert len(report.rows) == 2 * 2 * STEPS * LAYERS  # two runs, two contexts
    assert report.count(kind="skipped")
    assert not report.count(kind="skipped", layer=0)
    assert report.count(kind="dense") == report.count(step=0) == 2 * 2 * LAYERS
