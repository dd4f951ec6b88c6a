"""Tiny Wan models and pipelines with random weights, and what tests ask of their reports."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

from rainfusion.integrations.diffusers import RainFusionConfig, Report

LAYERS = 3
TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": LAYERS,
}


def wan(seed: int = 0, **settings: Any) -> WanTransformer3DModel:
    """A model; its last scale is not zero, as it is in a new one."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(**TINY | settings).eval()


def inputs(
    frames: int = 3, height: int = 8, width: int = 8, text: int = 7, step: int = 500, seed: int = 1, batch: int = 1
) -> dict[str, Any]:
    """Arguments of a forward; height and width in tokens."""
    random = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width, generator=random),
        "timestep": torch.full((batch,), step),
        "encoder_hidden_states": torch.randn(batch, text, 16, generator=random),
        "return_dict": False,
    }


def settings(**other: Any) -> RainFusionConfig:
    """A configuration under which tiny models are sparse."""
    return RainFusionConfig(**{"sparsity": 0.6, "block": 16, "min_blocks": 0, "sink": None} | other)


def wan_pipeline(experts: int = 1, scheduler: Any = None, **models: Any) -> WanPipeline:
    """A pipeline without text encoder and VAE: give it embeddings and ask for latents."""
    second = {"transformer_2": wan(1), "boundary_ratio": 0.5} if experts == 2 else {}
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    given = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": wan(), "scheduler": scheduler}
    pipe = WanPipeline(**given | second | models)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Nameless:
    """A pipeline of an own make: no contexts, a scheduler of diffusers."""

    def __init__(self, scheduler: Any) -> None:
        self.components = {"transformer": wan(), "scheduler": scheduler}
        self.scheduler, self.transformer = scheduler, self.components["transformer"]

    def __call__(
        self, steps: int, start: int = 0, height: int = 8, stop: int | None = None, seed: int = 1
    ) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        if start and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        self._num_timesteps = steps - start
        latents = inputs(height=height, seed=seed)["hidden_states"]
        for t in self.scheduler.timesteps[start:stop]:
            arguments = inputs(height=height) | {"hidden_states": latents, "timestep": t.expand(1)}
            latents = self.scheduler.step(self.transformer(**arguments)[0], t, latents, return_dict=False)[0]
        return latents


def run(pipe: Any, steps: int = 4, height: int = 128, width: int = 128, **call: Any) -> torch.Tensor:
    """A run of a pipeline: its latents."""
    random = torch.Generator().manual_seed(2)
    prompt, negative = (torch.randn(1, 7, 16, generator=random) for _ in range(2))
    return pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        num_inference_steps=steps,
        height=height,
        width=width,
        num_frames=9,
        generator=random,
        output_type="latent",
        return_dict=False,
        **call,
    )[0]


def happened(report: Report, layer: int = 0, **where: Any) -> list[tuple[Any, ...]]:
    """(model, run, step, context, kind) of a layer's rows."""
    return [
        (row.model, row.run, row.step, row.context, row.kind)
        for row in report.rows
        if row.layer == layer and all(getattr(row, name) == value for name, value in where.items())
    ]


def kinds(report: Report, **where: Any) -> list[str]:
    """What became of the calls of one layer."""
    return [row[-1] for row in happened(report, **where)]
