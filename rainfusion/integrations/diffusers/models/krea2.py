"""Krea 2: text, then the image.

Pipelines pad text in the middle. Text has no order in this model, so its valid tokens are brought to the front.
"""

from __future__ import annotations

from typing import Any

import torch

from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter
from rainfusion.integrations.diffusers.models._sizes import image_grids


def _valid_first(arguments: Arguments) -> dict[str, Any]:
    mask, text = arguments["encoder_attention_mask"], arguments["encoder_hidden_states"]
    if mask is None:
        return {}
    order = torch.argsort(mask.bool(), dim=1, descending=True, stable=True)
    return {
        "encoder_attention_mask": mask.gather(1, order),
        "encoder_hidden_states": text.gather(1, order[:, :, None, None].expand_as(text)),
    }


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    count = arguments["encoder_hidden_states"].shape[1]
    grids = image_grids(arguments["position_ids"], start=count)
    return grids if isinstance(grids, str) else (REST, *grids)


register_adapter(
    "Krea2Transformer2DModel",
    Adapter(
        r"transformer_blocks\.\d+\.attn",
        _parts,
        pads=True,
        prepare=_valid_first,
        family="Krea 2",
        tested="one image, batches of text with pads at the end and in the middle",
    ),
)
