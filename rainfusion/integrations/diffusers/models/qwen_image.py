"""Qwen-Image, with edits and layers: text, then the images one after another."""

from __future__ import annotations

from typing import Any

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers.adapter import (
    REST,
    Adapter,
    Arguments,
    Parts,
    register_adapter,
)
from rainfusion.integrations.diffusers.models._sizes import hides_end_only


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    if not hides_end_only(arguments["encoder_hidden_states_mask"]):
        return "mask hides more than the end of the text"
    shapes = arguments["img_shapes"]
    first = shapes[0] if isinstance(shapes, list) else shapes
    images = first if isinstance(first, list) else [first]
    return (REST, *(Grid(frames, height, width) for frames, height, width in images))


register_adapter(
    "QwenImageTransformer2DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn",
        _parts,
        pads=True,
        split="text_apart",
        family="Qwen-Image, Edit, Layered",
        tested="one and several images, batches of padded text",
    ),
)
