"""CogView 3 Plus, CogView 4 and GLM-Image: text, then the image."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import Adapter, register_adapter
from rainfusion.integrations.diffusers.models._joint import text_and_image

for _model, _call, _family, _tested in (
    ("CogView3PlusTransformer2DModel", "sdpa", "CogView 3 Plus", "one image"),
    ("CogView4Transformer2DModel", "sdpa", "CogView 4", "one image; with a mask of text: dense"),
    ("GlmImageTransformer2DModel", "dispatch", "GLM-Image", "one image; steps that read a cache: dense"),
):
    register_adapter(
        _model,
        Adapter(r"transformer_blocks\.\d+\.attn1", text_and_image, call=_call, family=_family, tested=_tested),
    )
