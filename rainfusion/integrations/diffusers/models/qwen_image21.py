"""Qwen-Image 2.1: steps that read a cache attend from the image alone to text, condition images and the image.

The step that fills the cache is block-causal and chooses its backends itself: it stays dense.
"""

from __future__ import annotations

from typing import Any

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import hides_end_only


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    if arguments["kv_cache_mode"] != "cached":
        return "block-causal"
    if not hides_end_only(arguments["encoder_hidden_states_mask"]):
        return "mask hides more than the end of the text"
    frames, height, width = arguments["img_shapes"][0][-1]
    return REST, Grid(frames, height, width)


register_adapter(
    "QwenImage21Transformer2DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn",
        _parts,
        pads=True,
        prefix=True,
        family="Qwen-Image 2.1",
        tested="steps that read a cache, with condition images and padded text; others stay dense",
    ),
)
