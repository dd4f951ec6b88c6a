"""AnyFlow: as Wan, with latents frame by frame and two timesteps a frame."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rainfusion.integrations.diffusers.adapter import (
    Adapter,
    Arguments,
    Hoist,
    Order,
    Parts,
    leave_alone,
    register_adapter,
)
from rainfusion.integrations.diffusers.models._sizes import latent_grid
from rainfusion.integrations.diffusers.models.wan import HOIST as WAN


def _parts(model: Any, arguments: Arguments) -> Parts:
    return (latent_grid(arguments["hidden_states"].transpose(1, 2), model.config.patch_size),)


def _rotary(output: dict[str, Tensor], order: Order) -> dict[str, Tensor]:
    return {name: order.to_blocks(table, 2) for name, table in output.items()}


def _conditions(output: tuple[Any, ...], order: Order) -> tuple[Any, ...]:
    """The time embeddings, one a token, in block order; the text as it is."""
    embedded, projected, *others = output
    return (order.to_blocks(embedded, 1), order.to_blocks(projected, 1), *others)


HOIST = Hoist(outputs={**(WAN.outputs or {}), "rope": _rotary, "condition_embedder": _conditions})

register_adapter(
    "AnyFlowTransformer3DModel",
    Adapter(
        r"blocks\.\d+\.attn1",
        _parts,
        hoist=HOIST,
        family="AnyFlow",
        tested="video, odd grid, batch of 2, one frame, a timestep a frame",
    ),
)
leave_alone("AnyFlowFARTransformer3DModel", "its attention is causal by chunks, with a cache of keys and values")
