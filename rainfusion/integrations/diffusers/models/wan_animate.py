"""Wan Animate: as Wan, but tokens stay in their order, since the face adapter between the layers splits frames."""

from __future__ import annotations

from rainfusion.integrations.diffusers.adapter import Adapter, leave_alone, register_adapter
from rainfusion.integrations.diffusers.models._video import video_alone

register_adapter(
    "WanAnimateTransformer3DModel",
    Adapter(r"blocks\.\d+\.attn1", video_alone, family="Wan Animate", tested="video, odd grid, batch of 2, two frames"),
)
leave_alone("WanAnimate2Transformer3DModel", "its attention is sparse already, by a block mask of its own")
