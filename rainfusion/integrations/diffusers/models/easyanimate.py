"""EasyAnimate: text of two encoders in front of the video, by torch's own attention function."""

from __future__ import annotations

from typing import Any

from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import latent_grid


def _parts(model: Any, arguments: Arguments) -> Parts:
    patch = model.config.patch_size
    return REST, latent_grid(arguments["hidden_states"], (1, patch, patch))


register_adapter(
    "EasyAnimateTransformer3DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn1",
        _parts,
        call="sdpa",
        family="EasyAnimate",
        tested="video, odd grid, batch of 2, one frame, two text encoders",
    ),
)
