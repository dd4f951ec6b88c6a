"""HiDream-I1: the image, which is filled up to the largest where it is no square, then text."""

from __future__ import annotations

from typing import Any

from rainfusion.core.parts import Text
from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import image_grid


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    latents = arguments["hidden_states"]
    if latents.ndim != 4:
        return "the image is given as patches"
    grid = image_grid(latents, model.config.patch_size)
    is_square = latents.shape[-2] == latents.shape[-1]
    return grid, Text(0 if is_square else model.max_seq - grid.count), REST


register_adapter(
    "HiDreamImageTransformer2DModel",
    Adapter(
        r"(double|single)_stream_blocks\.\d+\.block\.attn1",
        _parts,
        call="sdpa",
        timestep="timesteps",
        family="HiDream-I1",
        tested="a square image, and another one with its pads",
    ),
)
