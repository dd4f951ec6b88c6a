"""MiniMax-H3: one packed sequence of text, references (frames, videos, audio), audio and the video to make.

Where each stands, and the sizes of the videos, is read from the forward's tensors of positions, once a layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from rainfusion.core.parts import Grid, Part, Text
from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import once, rasters

_NO_LAYOUT = "positions describe no whole videos"


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    video, other = arguments["video_indices"], (arguments["audio_indices"], arguments["text_indices"])
    key = (len(video), *map(len, other))
    return once(arguments["position_ids"], key, lambda places: _layout(places, video, other))


def _layout(places: Tensor, video: Tensor, other: tuple[Tensor, ...]) -> Parts | str:
    places, kind = places.detach().cpu(), torch.full((len(places),), -1)
    for number, indices in enumerate((video, *other)):
        kind[indices.detach().cpu()] = number
    parts: list[Part] = []
    for number, run in _runs(kind):
        found = _videos(places[run]) if number == 0 else [Text(run.stop - run.start)]
        if not found:
            return _NO_LAYOUT
        parts.extend(found)
    target = parts[-1]
    return (*parts[:-1], Grid(*target.sizes)) if isinstance(target, Grid) else _NO_LAYOUT


def _runs(kind: Tensor) -> Iterator[tuple[int, slice]]:
    """Runs of tokens of one kind: the kind, and which tokens."""
    start = 0
    for number, run in groupby(kind.tolist()):
        end = start + len([*run])
        yield number, slice(start, end)
        start = end


def _videos(places: Tensor) -> list[Grid]:
    """The videos that positions (time, row, column) number: frames of one size are one video while time goes on.

    None of them has a sink. Nothing where the positions number no whole frames.
    """
    time, row, column = places.unbind(1)
    frames = rasters(row, column, time) or []
    begins = [
        i
        for i, (one, two) in enumerate(pairwise(frames), 1)
        if one[1:] != two[1:] or time[two.start] <= time[one.start]
    ]
    return [
        Grid(end - first, frames[first].height, frames[first].width, sink=None)
        for first, end in pairwise([0, *begins, len(frames)])
        if frames
    ]


register_adapter(
    "MiniMaxH3Transformer3DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn",
        _parts,
        split="whole",
        family="MiniMax-H3",
        tested="video and audio, key frames, references of image, video and audio",
    ),
)
