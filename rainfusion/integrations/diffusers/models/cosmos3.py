"""Cosmos 3: of the two calls a layer, the one of video, sound and action on text and all of them.

That of text on text is causal and stays dense.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rainfusion.core.parts import Grid, Text
from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import once


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    if model._cp_shard_fn is not None:
        return "the sequence is split over devices"
    text, grids = arguments["und_len"], [Grid(t, h, w) for t, h, w in arguments["vision_token_shapes"]]
    count = sum(grid.count for grid in grids)
    first, last, found = once(arguments["vision_sequence_indexes"], "run", _run)
    if (first, last, found) != (text, text + count - 1, count):
        return "the video does not follow the text"
    return Text(text), *grids, Text(arguments["sequence_length"] - text - count)


def _run(indices: Tensor) -> tuple[int, int, int]:
    """First, last and number of indices."""
    return int(indices[0]), int(indices[-1]), len(indices)


register_adapter(
    "Cosmos3OmniTransformer",
    Adapter(
        r"layers\.\d+\.self_attn",
        _parts,
        prefix=True,
        family="Cosmos 3",
        tested="video, with sound; text on text stays dense",
    ),
)
