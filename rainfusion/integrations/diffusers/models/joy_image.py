"""JoyImage-Edit: the image to make, its references, then text."""

from __future__ import annotations

from typing import Any

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter


def _parts(model: Any, arguments: Arguments) -> Parts:
    latents = arguments["hidden_states"]
    items = latents.shape[1] if latents.ndim == 6 else 1
    sizes = zip(latents.shape[-3:], model.config.patch_size, strict=True)
    frames, height, width = (size // step for size, step in sizes)
    return (*(Grid(frames, height, width, sink=None) for _ in range(items)), REST)


register_adapter(
    "JoyImageEditTransformer3DModel",
    Adapter(r"double_blocks\.\d+\.attn", _parts, family="JoyImage-Edit", tested="one image, references"),
)
