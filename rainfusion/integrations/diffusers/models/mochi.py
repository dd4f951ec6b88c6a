"""Mochi: one call of torch's attention function a sample, each with the valid text of its own behind the video."""

from __future__ import annotations

from typing import Any

from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import latent_grid


def _parts(model: Any, arguments: Arguments) -> Parts:
    """Pads are taken out before the call, so `REST` is the valid text of one sample."""
    patch = model.config.patch_size
    return latent_grid(arguments["hidden_states"], (1, patch, patch)), REST


register_adapter(
    "MochiTransformer3DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn1",
        _parts,
        call="sdpa",
        family="Mochi",
        tested="video, odd grid, batch of 2, one frame, padded text of several lengths",
    ),
)
