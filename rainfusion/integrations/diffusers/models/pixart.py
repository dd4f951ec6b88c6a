"""PixArt alpha and Sigma: the self-attention is of the image alone."""

from __future__ import annotations

from typing import Any

from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import image_grid


def _parts(model: Any, arguments: Arguments) -> Parts:
    return (image_grid(arguments["hidden_states"], model.config.patch_size),)


register_adapter(
    "PixArtTransformer2DModel",
    Adapter(r"transformer_blocks\.\d+\.attn1", _parts, call="sdpa", family="PixArt alpha, Sigma", tested="one image"),
)
