"""Bria 3: text, then the image."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import leave_alone, register_adapter
from rainfusion.integrations.diffusers.models._joint import flux_like

register_adapter("BriaTransformer2DModel", flux_like("Bria 3", "one image"))
leave_alone("BriaFiboTransformer2DModel", "its pipelines give a mask for every pair of tokens")
