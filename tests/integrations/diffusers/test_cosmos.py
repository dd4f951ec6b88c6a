"""Cosmos 1, 2, 2.5: the video alone, through torch's own attention function."""

from __future__ import annotations

import pytest
import torch
from diffusers import CosmosTransformer3DModel

from tests.integrations.diffusers.families import Tiny, check_family, check_places


def make(**settings):
    return lambda: CosmosTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "num_layers": 3,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (8, 32, 32),
            "patch_size": (1, 2, 2),
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        }
        | settings
    )


def inputs(frames, height, width, batch=1, by_frame=False, image=False, fps=None):
    def arguments():
        timestep = torch.full((batch,), 0.5)
        if by_frame:
            timestep = torch.arange(batch * frames).view(batch, 1, frames, 1, 1) / 10
        text = torch.randn(batch, 7, 16)
        return {
            "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width),
            "timestep": timestep,
            "encoder_hidden_states": (text, torch.randn(batch, 5, 64)) if image else text,
            "fps": fps,
        }

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, :, 2, 4, 13] += 1
    return 2, 2, 6


COSMOS = Tiny(
    make(),
    {
        "video": inputs(5, 8, 8),
        "odd, batch of 2": inputs(3, 7, 9, batch=2, fps=16),
        "one frame": inputs(1, 12, 10),
        "a timestep a frame": inputs(5, 8, 8, by_frame=True),
    },
    touch=touch,
)
LEARNED = Tiny(make(extra_pos_embed_type="learnable"), {"video": inputs(5, 8, 8, fps=24)}, touch=touch)
WITH_IMAGE = Tiny(
    make(img_context_dim_in=64, img_context_num_tokens=5, img_context_dim_out=64),
    {"video": inputs(5, 8, 8, image=True)},
    touch=touch,
)
FAMILIES = {"cosmos": COSMOS, "learned positions": LEARNED, "image context": WITH_IMAGE}
CASES = [(family, name) for family, tiny in FAMILIES.items() for name in tiny.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_places(family):
    check_places(FAMILIES[family], "video")
