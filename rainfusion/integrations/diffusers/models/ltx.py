"""LTX-Video and LTX-2: tokens of the video come in as a sequence, with the sizes of the grid or with coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rainfusion.core.parts import Grid, Text
from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Hoist, Order, Parts, register_adapter

NO_GRID = "neither num_frames, height and width nor video_coords give a grid"


def _given(arguments: Arguments, patch: tuple[int, int, int]) -> Grid | None:
    """The grid of the arguments that say so."""
    sizes = [arguments[name] for name in ("num_frames", "height", "width")]
    if any(size is None for size in sizes):
        return None
    frames, height, width = (-(-int(size) // step) for size, step in zip(sizes, patch, strict=True))
    return Grid(frames, height, width)


_seen = WeakTensorKeyDictionary()


def _by_coordinates(coordinates: Tensor) -> Grid | None:
    """The grid of the coordinates; read once a tensor, which waits for the device. Pipelines keep theirs for a run.

    Those of LTX-2 have a start and an end, and the grid comes first: backwards and negative, it comes last.
    """
    if coordinates not in _seen:
        read = coordinates[0].detach().cpu()
        _seen[coordinates] = _grid_at_the_end(-read[..., 0].flip(1) if read.ndim == 3 else read)
    found: Grid | None = _seen[coordinates]
    return found


def _grid_at_the_end(coordinates: Tensor) -> Grid | None:
    """The grid that the last tokens form, from their coordinates (time, row, column) ``[3, tokens]``.

    Its frames are all that have rows and columns as the last one has, at whatever time: conditions of the size of the
    video are frames of it. None where that is less than half of the tokens.
    """
    frame, width = _run_at_the_end(coordinates[0]), _run_at_the_end(coordinates[1])
    if frame % width:
        return None
    tokens = coordinates.shape[1]
    frames = coordinates[:, tokens % frame :].reshape(3, -1, frame)
    rows, columns = frames[1:, -1].reshape(2, -1, width)
    if not (torch.equal(rows, rows[:, :1].expand_as(rows)) and torch.equal(columns, columns[:1].expand_as(columns))):
        return None
    alike = (frames[0] == frames[0, :, :1]).all(-1) & (frames[1:] == frames[1:, -1:]).all(-1).all(0)
    count = _run_at_the_end(alike.float())
    return Grid(count, frame // width, width) if 2 * count * frame >= tokens else None


def _run_at_the_end(values: Tensor) -> int:
    """How many of the last values equal the last."""
    others = (values != values[-1]).nonzero()
    return len(values) - (int(others[-1]) + 1 if len(others) else 0)


def _beside(arguments: Arguments, grid: Grid) -> Text:
    """The tokens of conditions beside the video, protected."""
    return Text(arguments["hidden_states"].shape[1] - grid.count)


def _ltx(model: Any, arguments: Arguments) -> Parts | str:
    """Conditions stand in front of the video; pipelines with coordinates give no sizes, or sizes of 1."""
    coordinates = arguments["video_coords"]
    grid = _given(arguments, (1, 1, 1)) if coordinates is None else _by_coordinates(coordinates)
    return NO_GRID if grid is None else (_beside(arguments, grid), grid)


def _ltx2(model: Any, arguments: Arguments) -> Parts | str:
    """Conditions stand behind the video."""
    patch, coordinates = model.config.patch_size, arguments["video_coords"]
    grid = _given(arguments, (model.config.patch_size_t, patch, patch))
    if grid is None and coordinates is not None:
        grid = _by_coordinates(coordinates)
    return NO_GRID if grid is None else (grid, _beside(arguments, grid))


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
        tested="video, odd grid, batch of 2, one frame, a timestep a token, coordinates, conditions in front",
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
