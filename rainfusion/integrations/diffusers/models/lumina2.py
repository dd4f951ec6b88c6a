"""Lumina 2: text, then the image; without pads where all texts of a batch have one length, else dense."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import Adapter, register_adapter
from rainfusion.integrations.diffusers.models._joint import text_and_image

register_adapter(
    "Lumina2Transformer2DModel",
    Adapter(
        r"layers\.\d+\.attn",
        text_and_image,
        call="sdpa",
        family="Lumina 2",
        tested="one image; a batch of texts of different lengths: dense",
    ),
)
