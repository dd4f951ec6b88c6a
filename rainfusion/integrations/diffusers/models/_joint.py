"""Text and images, as several families have them in one sequence."""

from __future__ import annotations

from typing import Any, Final

from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts
from rainfusion.integrations.diffusers.models._sizes import image_grid, image_grids

DOUBLE_AND_SINGLE: Final = r"(single_)?transformer_blocks\.\d+\.attn"


def text_and_images(model: Any, arguments: Arguments) -> Parts | str:
    """The parts of a sequence of text and the images of the argument ``img_ids``."""
    grids = image_grids(arguments["img_ids"])
    return grids if isinstance(grids, str) else (REST, *grids)


def flux_like(family: str, tested: str) -> Adapter:
    """An adapter for double and single blocks over text and images."""
    return Adapter(DOUBLE_AND_SINGLE, text_and_images, split="text_apart", family=family, tested=tested)


def text_and_image(model: Any, arguments: Arguments) -> Parts:
    """The parts of a sequence of text and the image of the latents ``[batch, channels, height, width]``."""
    return REST, image_grid(arguments["hidden_states"], model.config.patch_size)


def image_and_text(model: Any, arguments: Arguments) -> Parts:
    """The parts of a sequence of the image of the latents ``[batch, channels, height, width]`` and text."""
    return image_grid(arguments["hidden_states"], model.config.patch_size), REST
