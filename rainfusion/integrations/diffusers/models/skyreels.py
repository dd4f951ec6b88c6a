"""SkyReels V2: as Wan; with diffusion forcing a timestep a frame, and a block-causal mask where it is asynchronous."""

from __future__ import annotations

from typing import Any

from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Hoist, Parts, register_adapter
from rainfusion.integrations.diffusers.models._video import video_alone
from rainfusion.integrations.diffusers.models.wan import HOIST as WAN


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    return "block-causal mask" if model.config.num_frame_per_block > 1 else video_alone(model, arguments)


def _one_timestep(model: Any, arguments: Arguments) -> bool:
    """With a timestep a frame, the forward lays the timesteps out frame by frame: tokens have to stay in order."""
    return not arguments["enable_diffusion_forcing"]


register_adapter(
    "SkyReelsV2Transformer3DModel",
    Adapter(
        r"blocks\.\d+\.attn1",
        _parts,
        hoist=Hoist(outputs=WAN.outputs, fits=_one_timestep),
        family="SkyReels V2",
        tested="video, odd grid, batch of 2, one frame, diffusion forcing; block-causal stays dense",
    ),
)
