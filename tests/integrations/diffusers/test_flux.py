"""Flux 1 and the models made after it: text, then images that position ids number."""

from __future__ import annotations

from math import prod

import pytest
import torch
from diffusers import (
    BriaTransformer2DModel,
    FluxTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)

from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, seeded

SIZES = {
    "patch_size": 1,
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 12, 12),
}


def ids(*images, first=0):
    """Position ids (image, row, column) of images of (height, width) tokens."""
    rows = [
        (number, first + row, first + column)
        for number, (height, width) in enumerate(images)
        for row in range(height)
        for column in range(width)
    ]
    return torch.tensor(rows, dtype=torch.float32)


def inputs(*images, batch=1, text=11, first=0, **more):
    def arguments():
        return {
            "hidden_states": torch.randn(batch, sum(map(prod, images)), 8),
            "encoder_hidden_states": torch.randn(batch, text, 16),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": ids(*images, first=first),
            "txt_ids": torch.zeros(text, 3),
        } | {name: make(batch) for name, make in more.items()}

    return arguments


def touch(arguments):
    """Change the token in row 3, column 5 of the last image, whatever its width."""
    tokens = arguments["hidden_states"]
    last = arguments["img_ids"][:, 0] == arguments["img_ids"][-1, 0]
    width = len(arguments["img_ids"][last, 2].unique())
    tokens[0, int(last.nonzero()[0]) + 3 * width + 5] += 1
    return 0, 3, 5


def pooled(batch):
    return torch.randn(batch, 12)


def tiny(model, settings, references=True, **more):
    cases = {"image": inputs((16, 16), **more), "odd, batch of 2": inputs((13, 15), batch=2, **more)}
    if references:
        cases["reference"] = inputs((13, 15), (9, 11), **more)
    return Tiny(lambda: model(**SIZES | settings), cases, touch=touch)


FAMILIES = {
    "Flux": tiny(FluxTransformer2DModel, {"pooled_projection_dim": 12}, pooled_projections=pooled),
    "LongCat-Image": tiny(LongCatImageTransformer2DModel, {"pooled_projection_dim": 12}, first=512),
    "Ovis-Image": tiny(OvisImageTransformer2DModel, {"out_channels": 8}, references=False),
    "Bria": tiny(BriaTransformer2DModel, {}, references=False),
}
CASES = [(family, name) for family, one in FAMILIES.items() for name in one.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_places(family, name):
    check_places(FAMILIES[family], name)


def test_ids_that_number_no_images_stay_dense():
    tiny = FAMILIES["Flux"]
    model, arguments = tiny.made(), seeded(tiny.inputs["image"])
    arguments["img_ids"] = arguments["img_ids"][:200]
    arguments["hidden_states"] = arguments["hidden_states"][:, :200]
    with torch.no_grad():
        untouched = model(**arguments).sample
        with apply_rainfusion(model, config(tiny, sparsity=0.6)) as handle:
            out = model(**arguments).sample
    assert torch.equal(out, untouched)
    assert {row.why for row in handle.report().rows} == {"position ids number no whole images"}
