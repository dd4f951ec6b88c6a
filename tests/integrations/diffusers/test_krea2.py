"""Krea 2: text with pads wherever they are, and an image."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.diffusers.families import Tiny, check_family, check_places

Krea2Transformer2DModel = getattr(__import__("diffusers"), "Krea2Transformer2DModel", None)
pytestmark = pytest.mark.skipif(Krea2Transformer2DModel is None, reason="this diffusers has no Krea 2")

TEXT = 11


def make():
    return Krea2Transformer2DModel(
        in_channels=8,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(8, 12, 12),
    )


def inputs(height, width, batch=1, mask=None):
    def arguments():
        image = torch.stack(torch.meshgrid(torch.arange(1), *map(torch.arange, (height, width)), indexing="ij"), -1)
        return {
            "hidden_states": torch.randn(batch, height * width, 8),
            "encoder_hidden_states": torch.randn(batch, TEXT, 2, 16),
            "timestep": torch.full((batch,), 0.5),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), image.reshape(-1, 3)]),
            "encoder_attention_mask": mask,
        }

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, 3 * 15 + 5] += 1
    return 0, 3, 5


IN_THE_MIDDLE = torch.tensor([[1] * 4 + [0] * 4 + [1] * 3, [1] * 11, [1] + [0] * 7 + [1] * 3]).bool()
KREA2 = Tiny(
    make,
    {
        "image": inputs(16, 16),
        "odd, batch of 2": inputs(13, 15, batch=2),
        "pads at the end": inputs(13, 15, batch=2, mask=torch.arange(TEXT)[None] < torch.tensor([[11], [4]])),
        "pads in the middle": inputs(13, 15, batch=3, mask=IN_THE_MIDDLE),
    },
    touch=touch,
)


@pytest.mark.parametrize("name", KREA2.inputs)
def test_family(name):
    check_family(KREA2, name)


def test_places():
    check_places(KREA2, "odd, batch of 2")
