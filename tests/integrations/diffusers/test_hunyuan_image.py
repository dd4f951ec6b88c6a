"""HunyuanImage 2.1 and its refiner: an image, then one or two texts with pads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanImageTransformer2DModel

from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, seeded


def make(patch=(1, 1), second=None):
    return HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=patch,
        text_embed_dim=16,
        text_embed_2_dim=second,
        rope_axes_dim=(16, 16) if len(patch) == 2 else (8, 12, 12),
    )


def masks(lengths, count):
    return (torch.arange(count)[None] < torch.tensor(lengths)[:, None]).long()


def inputs(*sizes, lengths=(11,), second=None, mask=None):
    """Latents of (height, width) or (frames, height, width); valid tokens of the first and of a second text."""

    def arguments():
        batch = len(lengths)
        given = {
            "hidden_states": torch.randn(batch, 4, *sizes),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": torch.randn(batch, 11, 16),
            "encoder_attention_mask": masks(lengths, 11) if mask is None else mask,
        }
        if second is not None:
            given["encoder_hidden_states_2"] = torch.randn(batch, 7, 12)
            given["encoder_attention_mask_2"] = masks(second, 7)
        return given

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, ..., 3, 5] += 1
    return 0, 3, 5


HOLES = torch.tensor([[1, 0] * 5 + [1]])
IMAGE = Tiny(
    make,
    {
        "image": inputs(16, 16),
        "odd, batch of 2": inputs(13, 15, lengths=(11, 11)),
        "padded text": inputs(13, 15, lengths=(11, 4, 7)),
    },
    touch=touch,
)
TWO_TEXTS = replace(
    IMAGE,
    make=lambda: make(second=12),
    inputs={
        "two texts": inputs(13, 15, lengths=(11, 4), second=(0, 5)),
        "a mask with holes": inputs(13, 15, second=(5,), mask=HOLES),
    },
)
REFINER = replace(
    IMAGE,
    make=lambda: make(patch=(1, 2, 2)),
    inputs={"one frame": inputs(1, 26, 30, lengths=(11, 4)), "frames": inputs(3, 18, 22)},
)


@pytest.mark.parametrize(
    ("tiny", "name"), [(tiny, name) for tiny in (IMAGE, TWO_TEXTS, REFINER) for name in tiny.inputs]
)
def test_family(tiny, name):
    check_family(tiny, name)


@pytest.mark.parametrize(("tiny", "name"), [(IMAGE, "odd, batch of 2"), (TWO_TEXTS, "two texts")])
def test_places(tiny, name):
    check_places(tiny, name)


def test_a_mask_with_holes_stays_dense_where_the_model_does_not_sort():
    model, make_arguments = IMAGE.made(), inputs(13, 15, mask=HOLES)
    with torch.no_grad():
        untouched = model(**seeded(make_arguments)).sample
        with apply_rainfusion(model, config(IMAGE, sparsity=0.6)) as handle:
            out = model(**seeded(make_arguments)).sample
    assert torch.equal(out, untouched)
    assert {row.why for row in handle.report().rows} == {"mask hides more than the end of the text"}
