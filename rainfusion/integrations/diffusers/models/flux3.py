"""Flux 3: blocks of the image alone, then blocks of text, image and references."""

from __future__ import annotations

from typing import Any

from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._joint import text_and_images
from rainfusion.integrations.diffusers.models._sizes import image_grids


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    parts = text_and_images(model, arguments)
    references = arguments["image_cond_ids"]
    if isinstance(parts, str) or references is None:
        return parts
    grids = image_grids(references)
    return grids if isinstance(grids, str) else (*parts, *grids)


register_adapter(
    "Flux3Transformer2DModel",
    Adapter(
        r"single_transformer_blocks\.\d+\.attn",
        _parts,
        family="Flux 3",
        tested="one image, references; the blocks of one mode stay dense",
    ),
)
