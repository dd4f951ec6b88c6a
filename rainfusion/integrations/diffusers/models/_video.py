"""What the adapters of several video models share."""

from __future__ import annotations

from typing import Any

from rainfusion.integrations.diffusers.adapter import Arguments, Parts
from rainfusion.integrations.diffusers.models._sizes import latent_grid


def video_alone(model: Any, arguments: Arguments) -> Parts:
    """The parts where attention sees nothing but latents ``[batch, channels, frames, height, width]`` in patches."""
    return (latent_grid(arguments["hidden_states"], model.config.patch_size),)
