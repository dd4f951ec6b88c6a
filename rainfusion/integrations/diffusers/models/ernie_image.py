"""ERNIE-Image: the image, then text with pads at its end."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import Adapter, register_adapter
from rainfusion.integrations.diffusers.models._joint import image_and_text

register_adapter(
    "ErnieImageTransformer2DModel",
    Adapter(
        r"layers\.\d+\.self_attention",
        image_and_text,
        pads=True,
        family="ERNIE-Image",
        tested="one image, batches of padded text",
    ),
)
