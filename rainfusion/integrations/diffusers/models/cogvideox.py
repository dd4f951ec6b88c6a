"""CogVideoX 1.0 and 1.5: text in front of the video, by torch's own attention function."""

from __future__ import annotations

from typing import Any

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter


def _parts(model: Any, arguments: Arguments) -> Parts:
    """Latents are ``[batch, frames, channels, height, width]``; CogVideoX 1.0 has no patches in time."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    return REST, Grid(frames // patch_t, height // patch, width // patch)


register_adapter(
    "CogVideoXTransformer3DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn1",
        _parts,
        call="sdpa",
        family="CogVideoX",
        tested="1.0 and 1.5 patches, odd grid, batch of 2, one frame",
    ),
)
