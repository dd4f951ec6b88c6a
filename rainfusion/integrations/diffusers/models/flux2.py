"""Flux 2 and Klein: text, then the image and its references."""

from __future__ import annotations

from typing import Any

from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._joint import DOUBLE_AND_SINGLE, text_and_images


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    if arguments.get("kv_cache_mode") is not None:
        return "references attend to themselves alone"
    return text_and_images(model, arguments)


register_adapter(
    "Flux2Transformer2DModel",
    Adapter(
        DOUBLE_AND_SINGLE,
        _parts,
        split="text_apart",
        family="Flux 2, Klein",
        tested="one image, references; a cache of keys: dense",
    ),
)
