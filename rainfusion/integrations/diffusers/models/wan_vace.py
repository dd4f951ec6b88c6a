"""Wan VACE: as Wan, with further layers that see the control video, which has the grid of the video."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from rainfusion.integrations.diffusers.adapter import Adapter, Hoist, Order, register_adapter
from rainfusion.integrations.diffusers.models._video import video_alone
from rainfusion.integrations.diffusers.models.wan import HOIST as WAN


def _control(output: Tensor, order: Order) -> Tensor:
    """The control video in block order; the forward pads a shorter one with zeros at the end, so that is done first."""
    tokens = output.flatten(2)
    return order.to_blocks(F.pad(tokens, (0, order.order.numel() - tokens.shape[2])), 2)


HOIST = Hoist(outputs={**(WAN.outputs or {}), "vace_patch_embedding": _control})

register_adapter(
    "WanVACETransformer3DModel",
    Adapter(
        r"(vace_)?blocks\.\d+\.attn1",
        video_alone,
        hoist=HOIST,
        family="Wan VACE",
        tested="video, odd grid, batch of 2, one frame, control shorter than the video",
    ),
)
