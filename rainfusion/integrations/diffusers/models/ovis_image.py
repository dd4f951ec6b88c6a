"""Ovis-Image: text, then the image."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import register_adapter
from rainfusion.integrations.diffusers.models._joint import flux_like

register_adapter("OvisImageTransformer2DModel", flux_like("Ovis-Image", "one image"))
