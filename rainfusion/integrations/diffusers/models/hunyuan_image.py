"""HunyuanImage 2.1 and its refiner: the image, then text, of which the model brings the valid tokens to the front."""

from __future__ import annotations

from typing import Any

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._joint import DOUBLE_AND_SINGLE
from rainfusion.integrations.diffusers.models._sizes import hides_end_only


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    sorts = model.context_embedder_2 is not None and arguments["encoder_hidden_states_2"] is not None
    if not sorts and not hides_end_only(arguments["encoder_attention_mask"]):
        return "mask hides more than the end of the text"
    sizes = arguments["hidden_states"].shape[2:]
    counts = [size // step for size, step in zip(sizes, model.config.patch_size, strict=True)]
    frames, height, width = counts if len(counts) == 3 else (1, *counts)
    return Grid(frames, height, width), REST


register_adapter(
    "HunyuanImageTransformer2DModel",
    Adapter(
        DOUBLE_AND_SINGLE,
        _parts,
        pads=True,
        family="HunyuanImage 2.1, refiner",
        tested="latents of 4 and 5 axes, one and two texts with pads",
    ),
)
