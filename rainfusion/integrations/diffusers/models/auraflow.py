"""AuraFlow: registers and text, then the image."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import Adapter, register_adapter
from rainfusion.integrations.diffusers.models._joint import text_and_image

register_adapter(
    "AuraFlowTransformer2DModel",
    Adapter(
        r"(joint|single)_transformer_blocks\.\d+\.attn",
        text_and_image,
        call="sdpa",
        family="AuraFlow",
        tested="one image",
    ),
)
