"""What the adapters of several video models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rainfusion.core.parts import Grid, Sink
from rainfusion.integrations.diffusers.adapter import Arguments, Parts
from rainfusion.integrations.diffusers.models._sizes import latent_grid


def video_alone(model: Any, arguments: Arguments) -> Parts:
    """The parts where attention sees nothing but latents ``[batch, channels, frames, height, width]`` in patches."""
    return (latent_grid(arguments["hidden_states"], model.config.patch_size),)


def padded_grid(latents: Tensor, patch: Sequence[int], sink: Sink) -> Grid:
    """The tokens of latents ``[batch, channels, frames, height, width]`` that are padded to whole patches first."""
    frames, height, width = (-(-size // step) for size, step in zip(latents.shape[2:], patch, strict=True))
    return Grid(frames, height, width, sink=sink)
