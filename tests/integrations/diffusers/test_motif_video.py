"""Motif-Video: the video and then image and text; the decoder layers see the video twice."""

from __future__ import annotations

import pytest
import torch
from diffusers import MotifVideoTransformer3DModel

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers import apply_rainfusion
from rainfusion.integrations.diffusers.adapter import REST, known
from tests.integrations.diffusers.families import (
    Tiny,
    check_equal,
    check_family,
    check_places,
    config,
    first,
    seeded,
)


def make(decoders=2, **settings):
    return lambda: MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=3,
        num_decoder_layers=decoders,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=16,
        image_embed_dim=12,
        rope_axes_dim=(8, 12, 12),
        **settings,
    )


def inputs(frames, height, width, lengths=(13,), of=13, image=False, mask=True):
    def arguments():
        batch = len(lengths)
        valid = torch.arange(of)[None] < torch.tensor(lengths)[:, None]
        return {
            "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, of, 16),
            "encoder_attention_mask": valid.long() if mask else None,
            "image_embeds": torch.randn(batch, 5, 12) if image else None,
        }

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, :, 2, 4, 13] += 1
    return 2, 2, 6


MOTIF = Tiny(
    make(),
    {
        "video": inputs(5, 8, 8),
        "no mask": inputs(5, 8, 8, mask=False),
        "odd, batch of 2, padded text": inputs(3, 7, 9, lengths=(9, 4)),
        "one frame": inputs(1, 12, 10),
        "an image": inputs(3, 8, 8, lengths=(4,), image=True),
    },
    touch=touch,
)
WITH_CROSS = Tiny(
    make(decoders=0, enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
    {"padded text, image": inputs(3, 8, 8, lengths=(9,), image=True)},
)
FAMILIES = {"motif": MOTIF, "cross-attention, no decoder": WITH_CROSS}
CASES = [(family, name) for family, tiny in FAMILIES.items() for name in tiny.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


def test_places():
    check_places(MOTIF, "video")


def test_as_much_text_as_video():
    """Parts go by the layer and not by the length, which does not tell the two kinds of layers apart here."""
    model, arguments = MOTIF.made(), seeded(inputs(3, 6, 8, lengths=(144,), of=144))
    parts = known()[0]["MotifVideoTransformer3DModel"].parts(model, arguments)
    grid = Grid(3, 6, 8)
    assert [parts(layer) for layer in range(4)] == [(grid, REST)] * 2 + [(grid, grid)] * 2
    with torch.no_grad():
        check_equal(MOTIF, model, arguments, first(model(**arguments)), sparsity=1e-9, kind="sparse")


def test_pads_in_front_stay_dense():
    model, arguments = MOTIF.made(), seeded(MOTIF.inputs["odd, batch of 2, padded text"])
    arguments["encoder_attention_mask"] = arguments["encoder_attention_mask"].flip(1)
    with torch.no_grad():
        untouched = first(model(**arguments))
        with apply_rainfusion(model, config(MOTIF, sparsity=0.6)) as handle:
            assert torch.equal(first(model(**arguments)), untouched)
    assert handle.report().count(kind="dense") == 4
    assert "pads in front of text" in str(handle.report())
