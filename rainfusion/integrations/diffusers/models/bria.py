"""Bria 3 and Fibo: text, then the image, in an edit with the one to change."""

from __future__ import annotations

from typing import Any

from rainfusion.integrations.diffusers.adapter import Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._joint import DOUBLE_AND_SINGLE, flux_like, text_and_images
from rainfusion.integrations.diffusers.models._sizes import hides_end_only


def _fibo_parts(model: Any, arguments: Arguments) -> Parts | str:
    mask = (arguments["joint_attention_kwargs"] or {}).get("attention_mask")
    if not hides_end_only(mask, arguments["encoder_hidden_states"].shape[1]):
        return "mask hides more than the end of the text"
    return text_and_images(model, arguments)


register_adapter("BriaTransformer2DModel", flux_like("Bria 3", "one image"))
register_adapter(
    "BriaFiboTransformer2DModel",
    Adapter(
        DOUBLE_AND_SINGLE,
        _fibo_parts,
        pads=True,
        family="Bria Fibo, Edit",
        tested="one image, a reference, batches of padded text",
    ),
)
