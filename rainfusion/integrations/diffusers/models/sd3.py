"""Stable Diffusion 3: the image, then text; in 3.5 some layers have a second attention of the image alone."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import Adapter, register_adapter
from rainfusion.integrations.diffusers.models._joint import image_and_text

register_adapter(
    "SD3Transformer2DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn2?",
        image_and_text,
        call="sdpa",
        family="Stable Diffusion 3, 3.5",
        tested="one image, with and without the second attention",
    ),
)
