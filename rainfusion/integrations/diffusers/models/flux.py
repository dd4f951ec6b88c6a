"""Flux 1, with references (Kontext), Fill and controls: text, then images."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import leave_alone, register_adapter
from rainfusion.integrations.diffusers.models._joint import flux_like

register_adapter("FluxTransformer2DModel", flux_like("Flux, Kontext", "one image, an image and a reference"))
leave_alone(
    "ChromaTransformer2DModel", "its pipelines add a value for every pair of tokens to the scores, which no block hides"
)
