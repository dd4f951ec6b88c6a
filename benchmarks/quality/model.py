"""The video model of the quality measurements: a small Wan transformer on pixels, and how it denoises.

Its input has, as Wan's image-to-video models have, the noisy video, one given frame at its place in the video, and
where that is: 3 + 3 + 1 channels. Frames that are not given are zero there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from quality import scenes

ASSET = Path(__file__).parent / "assets" / "tiny_video.safetensors"
PATCH = 4
SHIFT = 3.0
CONFIG: dict[str, Any] = {
    "patch_size": (1, PATCH, PATCH),
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 7,
    "out_channels": 3,
    "text_dim": scenes.TEXT_DIM,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 8,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}


class Task(NamedTuple):
    """What the model is asked for, and the answer.

    Attributes:
        video: the answer ``[B, 3, F, H, W]`` in [-1, 1].
        given: the given frame and its place ``[B, 4, F, H, W]``; zeros where none is given.
        text: ``[B, tokens, TEXT_DIM]``; zeros for no text.
    """

    video: Tensor
    given: Tensor
    text: Tensor


def task(drawn: scenes.Scenes, grid: tuple[int, int, int], frame: Tensor | None) -> Task:
    """The task of scenes on a grid of tokens (frames, height, width).

    Args:
        frame: the frame that is given, int ``[B]``, -1 for none; None: none in all.
    """
    video = scenes.render(drawn, grid[0], grid[1] * PATCH, grid[2] * PATCH)
    here = torch.zeros_like(video[:, :1])
    if frame is not None:
        here += (torch.arange(grid[0], device=video.device) == frame[:, None])[:, None, :, None, None]
    return Task(video, torch.cat([video * here, here], dim=1), scenes.text(drawn))


def new_model() -> WanTransformer3DModel:
    """The model with random weights."""
    return WanTransformer3DModel(**CONFIG)


def trained_model(path: Path = ASSET) -> WanTransformer3DModel:
    """The model that `train.py` trained, in float32."""
    model = new_model()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def digest(path: Path = ASSET) -> str:
    """SHA-256 of the weights' file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def denoise(
    model: torch.nn.Module,
    asked: Task,
    noise: Tensor,
    *,
    steps: int = 30,
    guidance: float = 1.0,
    before: Callable[[int], None] | None = None,
) -> Tensor:
    """A video in [-1, 1] from noise, by Euler's steps of a rectified flow.

    Args:
        guidance: of the text (classifier-free); 1 runs the model once a step.
        before: is told every step.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise
    for step, timestep in enumerate(scheduler.timesteps):
        if before is not None:
            before(step)
        model_input = torch.cat([latents, asked.given], dim=1)
        flow = _flow(model, model_input, timestep, asked.text)
        if guidance != 1:
            without = _flow(model, model_input, timestep, torch.zeros_like(asked.text))
            flow = without + guidance * (flow - without)
        latents = scheduler.step(flow, timestep, latents, return_dict=False)[0]
    return latents


def _flow(model: torch.nn.Module, model_input: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    dtype = next(model.parameters()).dtype
    times = timestep.expand(model_input.shape[0])
    return model(model_input.to(dtype), times, text.to(dtype), return_dict=False)[0].float()
