"""LongCat-Image, with edits: text, then the image and its reference."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import register_adapter
from rainfusion.integrations.diffusers.models._joint import flux_like

register_adapter("LongCatImageTransformer2DModel", flux_like("LongCat-Image, Edit", "one image, a reference"))
