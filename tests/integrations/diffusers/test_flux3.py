"""Flux 3: the joint blocks over text, image and references."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from tests.integrations.diffusers.families import Tiny, check_family, check_places
from tests.integrations.diffusers.test_flux2 import ids

Flux3Transformer2DModel = getattr(__import__("diffusers"), "Flux3Transformer2DModel", None)
pytestmark = pytest.mark.skipif(Flux3Transformer2DModel is None, reason="this diffusers has no Flux 3")


def make(mode_layers=1):
    return Flux3Transformer2DModel(
        in_channels=8,
        cond_in_channels=8,
        num_layers=mode_layers,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_channels=16,
        axes_dims_rope=(8, 8, 8, 8),
    )


def inputs(image, *references, batch=1, text=11):
    def arguments():
        given = {
            "hidden_states": torch.randn(batch, prod(image), 8),
            "encoder_hidden_states": torch.randn(batch, text, 16),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": ids([image], [0]),
            "txt_ids": ids([(1, text)], [0])[:, [0, 1, 3, 2]],
        }
        if references:
            given["image_cond_hidden_states"] = torch.randn(batch, sum(map(prod, references)), 8)
            given["image_cond_ids"] = ids(references, [10 + 10 * i for i in range(len(references))])
        return given

    return arguments


def touch(arguments):
    arguments["image_cond_hidden_states"][0, 9 * 11 + 3 * 8 + 5] += 1
    return 0, 3, 5


FLUX3 = Tiny(
    make,
    {
        "image": inputs((16, 16)),
        "odd, batch of 2": inputs((13, 15), batch=2),
        "references": inputs((13, 15), (9, 11), (8, 8)),
    },
    touch=touch,
)


@pytest.mark.parametrize("name", FLUX3.inputs)
def test_family(name):
    check_family(FLUX3, name)


def test_places():
    """Without blocks of one mode, in which the tokens of an image meet before the joint blocks."""
    check_places(replace(FLUX3, make=lambda: make(mode_layers=0)), "references")
