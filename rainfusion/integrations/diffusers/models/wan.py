"""Wan 2.1 and 2.2: text, image and video to video; the self-attention is of the video alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Hoist, Order, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import latent_grid


def _parts(model: Any, arguments: Arguments) -> Parts:
    return (latent_grid(arguments["hidden_states"], model.config.patch_size),)


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
        _parts,
        hoist=HOIST,
        family="Wan 2.1, 2.2",
        tested="video, odd grid, batch of 2, one frame, a timestep a token",
    ),
)
