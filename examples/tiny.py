"""Tiny pipelines with random weights, which need no download: what the examples run with ``--tiny``.

They make noise, in seconds on a CPU. Text encoders are left out: embeddings of a prompt are random numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from rainfusion.integrations.diffusers import RainFusionConfig

# A tiny model has a few hundred tokens: blocks are small, and may be few.
CONFIG = RainFusionConfig(sparsity=0.5, dense_steps=(1, 0), sink="first_frame_keys", block=16, min_blocks=0)
Tiny = tuple[Any, RainFusionConfig, dict[str, Any]]
"""A pipeline, a configuration for it, and the sizes to ask for."""

_VIDEO = {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 4}  # 5x8x8 tokens


class _WanPipeline(WanPipeline):
    def encode_prompt(self, *_: Any, **__: Any) -> Any:
        return torch.randn(1, 7, 16), torch.randn(1, 7, 16)


class _WanImageToVideoPipeline(WanImageToVideoPipeline):
    def encode_prompt(self, *_: Any, **__: Any) -> Any:
        return torch.randn(1, 7, 16), torch.randn(1, 7, 16)


class _FluxPipeline(FluxPipeline):
    def encode_prompt(self, *_: Any, **__: Any) -> Any:
        return torch.randn(1, 7, 16), torch.randn(1, 16), torch.zeros(7, 3)


class _QwenImageEditPipeline(QwenImageEditPipeline):
    def encode_prompt(self, *_: Any, **__: Any) -> Any:
        return torch.randn(1, 7, 16), None


def wan_text_to_video() -> Tiny:
    """Two tiny experts of Wan 2.2, and a tiny VAE."""
    torch.manual_seed(0)
    experts = {"transformer": _wan(in_channels=4), "transformer_2": _wan(in_channels=4)}
    pipe = _WanPipeline(None, None, **_wan_parts(), **experts, boundary_ratio=0.5)
    return pipe, CONFIG, _VIDEO


def wan_image_to_video() -> Tiny:
    """A tiny Wan 2.1 for a first image, whose latents and mask are channels of the input."""
    torch.manual_seed(0)
    return _WanImageToVideoPipeline(None, None, **_wan_parts(), transformer=_wan(in_channels=12)), CONFIG, _VIDEO


def _wan(in_channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=in_channels, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=3,
    ).eval()  # fmt: skip


def _wan_parts() -> dict[str, Any]:
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return {"vae": vae.eval(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0)}


def flux() -> Tiny:
    """A tiny Flux: 32x32 tokens of the image beside those of the text."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, shift_factor=0.0)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae.eval(), "transformer": transformer.eval()}
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return _FluxPipeline(**parts, **absent), CONFIG, {"height": 64, "width": 64, "num_inference_steps": 4}


def qwen_image_edit() -> Tiny:
    """A tiny Qwen-Image-Edit: 16x16 tokens of the result, as many of the image that is edited, and text."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(  # folds 32x32 pixels into one latent: the pipeline works on a million pixels
        base_dim=2, z_dim=4, dim_mult=[1] * 6, num_res_blocks=1, temperal_downsample=[False] * 5,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "vae": vae.eval(), "transformer": transformer.eval()}
    absent = dict.fromkeys(("text_encoder", "tokenizer", "processor"))
    return _QwenImageEditPipeline(**parts, **absent), CONFIG, {"num_inference_steps": 4}
