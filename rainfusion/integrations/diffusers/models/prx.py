"""PRX: the image attends to text and to itself; text has keys alone."""

from __future__ import annotations

from typing import Any

from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._joint import text_and_image
from rainfusion.integrations.diffusers.models._sizes import hides_end_only


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    if not hides_end_only(arguments["attention_mask"]):
        return "mask hides more than the end of the text"
    return text_and_image(model, arguments)


register_adapter(
    "PRXTransformer2DModel",
    Adapter(
        r"blocks\.\d+\.attention",
        _parts,
        pads=True,
        prefix=True,
        family="PRX",
        tested="one image, batches of padded text; text longer than an eighth of the image: dense",
    ),
)
