"""HunyuanVideo, FramePack and HunyuanVideo 1.5: the video and then the text, whose pads a mask of keys hides."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import latent_grid
from rainfusion.integrations.diffusers.models._video import padded_grid

LAYERS = r"(single_)?transformer_blocks\.\d+\.attn"


def _grid(model: Any, arguments: Arguments) -> Grid:
    patch = model.config.patch_size
    return latent_grid(arguments["hidden_states"], (model.config.patch_size_t, patch, patch))


def _parts(model: Any, arguments: Arguments) -> Parts:
    return _grid(model, arguments), REST


# -- FramePack -----------------------------------------------------------------------------------------

# Where the forward puts its history: by the name of the latents, the patch in which they are embedded.
_HISTORY = {
    "latents_history_4x": (4, 8, 8),
    "latents_history_2x": (2, 4, 4),
    "latents_clean": (1, 2, 2),
}


def _framepack(model: Any, arguments: Arguments) -> Parts:
    """History, coarse to fine, then the section that is made, then image and text.

    The first of the clean frames is the start image, which takes the place of the section's first frame as a sink.
    """
    history = {name: arguments[name] for name in _HISTORY if arguments[name] is not None}
    grids = [
        padded_grid(latents, _HISTORY[name], sink="first_frame" if name == "latents_clean" else None)
        for name, latents in history.items()
        if arguments[name.replace("latents", "indices_latents")] is not None
    ]
    section = _grid(model, arguments)
    return *grids, Grid(*section.sizes, sink=None) if grids else section, REST


# -- HunyuanVideo 1.5 ----------------------------------------------------------------------------------


class HunyuanVideo15KeyMask:
    """The attention of HunyuanVideo 1.5 with a mask of keys ``[batch, 1, 1, keys]``.

    The model's own processor makes a mask of pairs ``[batch, 1, queries, keys]`` in every layer, gigabytes at 720p,
    which differs in the rows of padded text only. Those rows are hidden from all others by the mask of keys in every
    layer and are no part of the output, so valid tokens are the same, in sparse and in dense calls.
    """

    _attention_backend: Any
    _parallel_config: Any

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The attended video and text."""
        tokens = hidden_states.shape[1]
        query, key = (
            apply_rotary_emb(norm(_heads(project, hidden_states, attn)), image_rotary_emb, sequence_dim=1)
            for project, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
        )
        text_query, text_key = (
            norm(_heads(project, encoder_hidden_states, attn))
            for project, norm in ((attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k))
        )
        value, text_value = (
            _heads(attn.to_v, hidden_states, attn),
            _heads(attn.add_v_proj, encoder_hidden_states, attn),
        )
        out = dispatch_attention_fn(
            torch.cat([query, text_query], dim=1),
            torch.cat([key, text_key], dim=1),
            torch.cat([value, text_value], dim=1),
            attn_mask=F.pad(attention_mask.bool(), (tokens, 0), value=True)[:, None, None],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out[:, :tokens])), attn.to_add_out(out[:, tokens:])


def _heads(project: Any, x: Tensor, attn: Any) -> Tensor:
    projected: Tensor = project(x)
    return projected.view(*projected.shape[:2], attn.heads, -1)


register_adapter(
    "HunyuanVideoTransformer3DModel",
    Adapter(
        LAYERS,
        _parts,
        pads=True,
        family="HunyuanVideo, text and image to video",
        tested="video, odd grid, batch of 2, one frame, padded text of several lengths, token replace, latent concat",
    ),
)
register_adapter(
    "HunyuanVideoFramepackTransformer3DModel",
    Adapter(
        LAYERS,
        _framepack,
        pads=True,
        family="HunyuanVideo FramePack",
        tested="history of three rates, odd grid, batch of 2 with padded text, one frame",
    ),
)
register_adapter(
    "HunyuanVideo15Transformer3DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn",
        _parts,
        pads=True,
        processor=HunyuanVideo15KeyMask,
        family="HunyuanVideo 1.5",
        tested="video, odd grid, batch of 2, one frame, pads of two text encoders, with and without an image",
    ),
)
