"""Image models whose attention is left as it is."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import leave_alone

leave_alone("SanaTransformer2DModel", "its self-attention is linear")
leave_alone("NucleusMoEImageTransformer2DModel", "its keys end with text that has no queries")
leave_alone("OmniGenTransformer2DModel", "its pipelines give a mask for every pair of tokens")
leave_alone("Ideogram4Transformer2DModel", "it makes a mask for every pair of tokens")
