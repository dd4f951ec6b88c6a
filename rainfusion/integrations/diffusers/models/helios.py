"""Helios: history of three rates, coarse to fine, in front of the chunk of video that is made."""

from __future__ import annotations

from typing import Any

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import latent_grid
from rainfusion.integrations.diffusers.models._video import padded_grid

# By the name of the latents, in the order of the sequence, how many patches of the video one of theirs spans.
_HISTORY = {"latents_history_long": 4, "latents_history_mid": 2, "latents_history_short": 1}


def _parts(model: Any, arguments: Arguments) -> Parts:
    """The first frame of the short history is that of the video, which is a sink; without history the chunk has it."""
    patch = model.config.patch_size
    grids = [
        padded_grid(arguments[name], [rate * size for size in patch], sink="first_frame" if rate == 1 else None)
        for name, rate in _HISTORY.items()
        if arguments[name] is not None and arguments[f"indices_{name}"] is not None
    ]
    chunk = latent_grid(arguments["hidden_states"], patch)
    return *grids, Grid(*chunk.sizes, sink=None) if grids else chunk


register_adapter(
    "HeliosTransformer3DModel",
    Adapter(
        r"blocks\.\d+\.attn1",
        _parts,
        split="whole",
        family="Helios",
        tested="with and without history, odd grid, batch of 2, one frame, amplified history",
    ),
)
