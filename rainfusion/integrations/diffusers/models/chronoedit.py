"""ChronoEdit: as Wan, with another rotary table."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import Adapter, register_adapter
from rainfusion.integrations.diffusers.models._video import video_alone
from rainfusion.integrations.diffusers.models.wan import HOIST

register_adapter(
    "ChronoEditTransformer3DModel",
    Adapter(
        r"blocks\.\d+\.attn1",
        video_alone,
        hoist=HOIST,
        family="ChronoEdit",
        tested="video, odd grid, batch of 2, one frame, two frames, a timestep a token",
    ),
)
