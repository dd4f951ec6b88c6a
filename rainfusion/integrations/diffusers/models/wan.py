"""Wan 2.1 and 2.2: text, image and video to video; the self-attention is of the video alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Hoist, Order, register_adapter
from rainfusion.integrations.diffusers.models._video import video_alone


def _arguments(arguments: Arguments, order: Order) -> dict[str, Any]:
    timestep = arguments["timestep"]
    return {"timestep": order.to_blocks(timestep, 1)} if timestep.ndim == 2 else {}


def _embedded(output: Tensor, order: Order) -> Tensor:
    return order.to_blocks(output.flatten(2), 2).view_as(output)


def _rotary(output: tuple[Tensor, ...], order: Order) -> tuple[Tensor, ...]:
    return tuple(order.to_blocks(table, 1) for table in output)


def _projected(output: Tensor, order: Order) -> Tensor:
    return order.from_blocks(output, 1)


HOIST = Hoist(arguments=_arguments, outputs={"patch_embedding": _embedded, "rope": _rotary, "proj_out": _projected})

register_adapter(
    "WanTransformer3DModel",
    Adapter(
        r"blocks\.\d+\.attn1",
        video_alone,
        hoist=HOIST,
        family="Wan 2.1, 2.2",
        tested="video, odd grid, batch of 2, one frame, a timestep a token",
    ),
)
