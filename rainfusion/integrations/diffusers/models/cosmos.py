"""Cosmos 1, 2 and 2.5: the video alone. Its processors name no backend, so torch's own function is taken over."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import Adapter, register_adapter
from rainfusion.integrations.diffusers.models._video import video_alone

register_adapter(
    "CosmosTransformer3DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn1",
        video_alone,
        call="sdpa",
        family="Cosmos 1, 2, 2.5",
        tested="video, odd grid, batch of 2, one frame, learned positions, a timestep a frame, image context",
    ),
)
