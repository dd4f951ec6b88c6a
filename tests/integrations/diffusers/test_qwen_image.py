"""Qwen-Image: text and one or several images."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, seeded


def make(**settings):
    return QwenImageTransformer2DModel(
        **{
            "patch_size": 1,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 12, 12),
        }
        | settings
    )


def inputs(*images, batch=1, text=11, valid=None):
    """Arguments for images of (height, width) tokens; `valid` text tokens a sample, or a mask."""

    def arguments():
        mask = None if valid is None else torch.tensor(valid)
        if mask is not None and mask.ndim == 1:
            mask = torch.arange(text)[None] < mask[:, None]
        return {
            "hidden_states": torch.randn(batch, sum(map(prod, images)), 8),
            "encoder_hidden_states": torch.randn(batch, text, 16),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.full((batch,), 0.5),
            "img_shapes": [[(1, *image) for image in images]] * batch,
        }

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, 13 * 15 + 9 * 11 + 3 * 8 + 5] += 1
    return 0, 3, 5


EDIT = (13, 15), (9, 11), (8, 8)
QWEN = Tiny(
    make,
    {
        "image": inputs((16, 16)),
        "odd, batch of 2": inputs((13, 15), batch=2),
        "padded text": inputs((12, 14), batch=3, valid=[11, 4, 7]),
        "a mask that hides nothing": inputs((12, 14), batch=2, valid=[11, 11]),
        "edit": inputs(*EDIT),
        "edit, padded text": inputs(*EDIT, batch=2, valid=[5, 11]),
    },
    touch=touch,
)
LAYERED = replace(QWEN, make=lambda: make(use_layer3d_rope=True))
EDIT_2511 = replace(QWEN, make=lambda: make(zero_cond_t=True))


@pytest.mark.parametrize("name", QWEN.inputs)
def test_family(name):
    check_family(QWEN, name)


@pytest.mark.parametrize("tiny", [LAYERED, EDIT_2511], ids=["layered", "conditions at time zero"])
def test_variants(tiny):
    check_family(tiny, "edit")


def test_places():
    check_places(QWEN, "edit")


def test_shapes_without_a_list_a_sample():
    tiny = replace(QWEN, inputs={"plain": lambda: inputs((12, 14))() | {"img_shapes": [(1, 12, 14)]}})
    check_family(tiny, "plain")


def test_a_mask_with_holes_stays_dense():
    model, make_arguments = QWEN.made(), inputs((12, 14), valid=[[True, False] + [True] * 9])
    with torch.no_grad():
        untouched = model(**seeded(make_arguments)).sample
        with apply_rainfusion(model, config(QWEN, sparsity=0.6)) as handle:
            out = model(**seeded(make_arguments)).sample
    assert torch.equal(out, untouched)
    assert {row.why for row in handle.report().rows} == {"mask hides more than the end of the text"}
