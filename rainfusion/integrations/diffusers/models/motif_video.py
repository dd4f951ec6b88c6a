"""Motif-Video: the video and then image and text; in the decoder layers the video twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, LayerParts, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import latent_grid


def _parts(model: Any, arguments: Arguments) -> LayerParts | str:
    """The last single-stream layers decode: they see the video as it is decoded, then as it was encoded."""
    mask = arguments["encoder_attention_mask"]
    if mask is not None and not _hides_the_end(mask.bool()):
        return "pads in front of text"
    patch = model.config.patch_size
    grid = latent_grid(arguments["hidden_states"], (model.config.patch_size_t, patch, patch))
    decoding = len(model.transformer_blocks) + len(model.single_transformer_blocks) - model.config.num_decoder_layers

    def of_layer(layer: int) -> Parts:
        return (grid, REST) if layer < decoding else (grid, grid)

    return of_layer


def _hides_the_end(mask: Tensor) -> bool:
    """Whether pads are the end of every text; the side on which the tokenizer pads is up to its files."""
    return not bool((mask[:, 1:] & ~mask[:, :-1]).any())


register_adapter(
    "MotifVideoTransformer3DModel",
    Adapter(
        r"(single_)?transformer_blocks\.\d+\.attn",
        _parts,
        pads=True,
        family="Motif-Video",
        tested="video, odd grid, batch of 2, one frame, padded text of several lengths, image, decoder layers; text "
        "padded in front stays dense",
    ),
)
