"""LTX-Video and LTX-2: tokens of the video come in as a sequence, with the sizes of the grid as arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rainfusion.core.parts import Grid, Text
from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Hoist, Order, Parts, register_adapter

NO_GRID = "num_frames, height and width are not given"


def _grid(arguments: Arguments, patch: tuple[int, int, int]) -> Grid | None:
    sizes = [arguments[name] for name in ("num_frames", "height", "width")]
    if any(size is None for size in sizes):
        return None
    frames, height, width = (-(-int(size) // step) for size, step in zip(sizes, patch, strict=True))
    return Grid(frames, height, width)


def _extra(arguments: Arguments, grid: Grid) -> Text:
    """The tokens of conditions beside the video, protected."""
    return Text(arguments["hidden_states"].shape[1] - grid.count)


def _ltx(model: Any, arguments: Arguments) -> Parts | str:
    """Conditions stand in front of the video."""
    grid = _grid(arguments, (1, 1, 1))
    return NO_GRID if grid is None else (_extra(arguments, grid), grid)


def _ltx2(model: Any, arguments: Arguments) -> Parts | str:
    """Conditions stand behind the video."""
    patch = model.config.patch_size
    grid = _grid(arguments, (model.config.patch_size_t, patch, patch))
    return NO_GRID if grid is None else (grid, _extra(arguments, grid))


def _arguments(arguments: Arguments, order: Order) -> dict[str, Any]:
    """Everything that has a value a token of the video."""
    tokens = order.order.numel()
    values = {name: arguments.get(name) for name in ("hidden_states", "timestep", "video_keyframes_mask")}
    return {
        name: order.to_blocks(value, 1)
        for name, value in values.items()
        if value is not None and value.ndim > 1 and value.shape[1] == tokens
    }


def _rotary(output: tuple[Tensor, ...], order: Order) -> tuple[Tensor, ...]:
    """Tables ``[batch, tokens, channels]`` or ``[batch, heads, tokens, channels]``."""
    return tuple(order.to_blocks(table, table.ndim - 2) for table in output)


def _projected(output: Tensor, order: Order) -> Tensor:
    return order.from_blocks(output, 1)


def _without_mask(model: Any, arguments: Arguments) -> bool:
    """A mask of pairs of tokens is in the order of the sequence."""
    return arguments["video_self_attention_mask"] is None


LAYERS = r"transformer_blocks\.\d+\.attn1"
LTX = Hoist(arguments=_arguments, outputs={"rope": _rotary, "proj_out": _projected})
LTX2 = Hoist(
    arguments=_arguments,
    outputs={"rope": _rotary, "cross_attn_rope": _rotary, "proj_out": _projected},
    fits=_without_mask,
)

register_adapter(
    "LTXVideoTransformer3DModel",
    Adapter(
        LAYERS,
        _ltx,
        hoist=LTX,
        family="LTX-Video",
        tested="video, odd grid, batch of 2, one frame, conditions in front, a timestep a token",
    ),
)
register_adapter(
    "LTX2VideoTransformer3DModel",
    Adapter(
        LAYERS,
        _ltx2,
        hoist=LTX2,
        family="LTX-2",
        tested="video, odd grid, batch of 2, one frame, both rotary types, conditions behind, perturbed layers; "
        "float mask stays dense",
    ),
)
