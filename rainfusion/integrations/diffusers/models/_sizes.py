"""Grids of tokens, from what models are given."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rainfusion.core.parts import Grid


def latent_grid(latents: Tensor, patch: Sequence[int]) -> Grid:
    """The tokens of latents ``[batch, channels, frames, height, width]``, cut into patches (t, h, w)."""
    frames, height, width = (size // step for size, step in zip(latents.shape[2:], patch, strict=True))
    return Grid(frames, height, width)
