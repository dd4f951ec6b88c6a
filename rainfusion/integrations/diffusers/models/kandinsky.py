"""Kandinsky 5 and 6: the video alone, with latents frame by frame and channels last; reordered once a forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rainfusion.core.parts import Grid, Text
from rainfusion.integrations.diffusers.adapter import (
    Adapter,
    Arguments,
    Hoist,
    Order,
    Parts,
    leave_alone,
    register_adapter,
)


def _grid(model: Any, arguments: Arguments) -> Grid:
    sizes = arguments["hidden_states"].shape[1:4]
    frames, height, width = (size // step for size, step in zip(sizes, model.config.patch_size, strict=True))
    return Grid(frames, height, width)


def _kandinsky5(model: Any, arguments: Arguments) -> Parts | str:
    if arguments["sparse_params"] is not None:
        return "the model's own sparse attention (nabla)"
    return (_grid(model, arguments),)


def _kandinsky6(model: Any, arguments: Arguments) -> Parts:
    """Positions are given where a reference frame stands behind the video, at the position of the first frame."""
    grid = _grid(model, arguments)
    if arguments["visual_rope_pos"] is None or grid.frames == 1:
        return (grid,)
    return Grid(grid.frames - 1, grid.height, grid.width), Text(grid.height * grid.width)


def _embedded(output: Tensor, order: Order) -> Tensor:
    """Tokens ``[batch, frames, height, width, channels]``, also a rotary table of a batch."""
    return order.to_blocks(output.flatten(1, 3), 1).view_as(output)


def _rotary(output: Tensor, order: Order) -> Tensor:
    return order.to_blocks(output.flatten(0, 2), 0).view_as(output)


def _projected(output: Tensor, order: Order) -> Tensor:
    return order.from_blocks(output.flatten(1, 3), 1).view_as(output)


def _without_types(model: Any, arguments: Arguments) -> bool:
    """Types are added to tokens frame by frame."""
    return arguments["visual_token_type_ids"] is None


OUTPUTS = {"visual_embeddings": _embedded, "visual_rope_embeddings": _embedded, "out_layer.out_layer": _projected}

register_adapter(
    "Kandinsky5Transformer3DModel",
    Adapter(
        r"visual_transformer_blocks\.\d+\.self_attention",
        _kandinsky5,
        hoist=Hoist(outputs=OUTPUTS),
        family="Kandinsky 5",
        tested="video, odd grid, batch of 2, one frame; nabla stays as it is",
    ),
)
register_adapter(
    "Kandinsky6Transformer3DModel",
    Adapter(
        r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
        _kandinsky6,
        hoist=Hoist(outputs={**OUTPUTS, "visual_rope_embeddings": _rotary}, fits=_without_types),
        family="Kandinsky 6",
        tested="video, odd grid, batch of 2, one frame, audio, a reference frame, types of frames",
    ),
)
leave_alone("Kandinsky6SRTransformer3DModel", "its attention is sparse already, by a block mask of its own")
