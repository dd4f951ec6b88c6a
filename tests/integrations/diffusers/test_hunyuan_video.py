"""HunyuanVideo, FramePack, HunyuanVideo 1.5: the video, then text with pads that a mask of keys hides."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models import attention_dispatch

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers import apply_rainfusion
from rainfusion.integrations.diffusers.adapter import REST
from rainfusion.integrations.diffusers.models import hunyuan_video
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, first, seeded

SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (8, 12, 12),
}


def valid(lengths, of):
    return (torch.arange(of)[None] < torch.tensor(lengths)[:, None]).long()


def touch(arguments):
    arguments["hidden_states"][0, :, 2, 4, 13] += 1
    return 2, 2, 6


# -- HunyuanVideo --------------------------------------------------------------------------------------


def hunyuan(condition=None):
    in_channels = 9 if condition == "latent_concat" else 4
    return lambda: HunyuanVideoTransformer3DModel(
        **SIZES | {"in_channels": in_channels}, image_condition_type=condition
    )


def inputs(frames, height, width, lengths=(13,), channels=4):
    def arguments():
        batch = len(lengths)
        return {
            "hidden_states": torch.randn(batch, channels, frames, 2 * height, 2 * width),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, 13, 16),
            "encoder_attention_mask": valid(lengths, 13),
            "pooled_projections": torch.randn(batch, 8),
            "guidance": torch.full((batch,), 6000.0),
        }

    return arguments


HUNYUAN = Tiny(
    hunyuan(),
    {
        "video": inputs(5, 8, 8),
        "odd, batch of 2": inputs(3, 7, 9, lengths=(13, 13)),
        "one frame": inputs(1, 12, 10),
        "padded text": inputs(3, 7, 9, lengths=(9, 4)),
        "hardly any text": inputs(4, 6, 8, lengths=(1,)),
    },
    touch=touch,
)
TOKEN_REPLACE = Tiny(
    hunyuan("token_replace"), {"video": inputs(5, 8, 8), "padded text": inputs(3, 7, 9, lengths=(9, 4))}, touch=touch
)
LATENT_CONCAT = Tiny(
    hunyuan("latent_concat"),
    {"video": inputs(5, 8, 8, channels=9), "padded text": inputs(3, 7, 9, lengths=(9, 4), channels=9)},
    touch=touch,
)

# -- FramePack -----------------------------------------------------------------------------------------


def framepack(frames, height, width, lengths=(13,)):
    def arguments():
        batch = len(lengths)
        past = {"clean": [0, 20], "history_2x": [18, 19], "history_4x": [*range(2, 18)]}
        found = inputs(frames, height, width, lengths)() | {
            "image_embeds": torch.randn(batch, 5, 12),
            "indices_latents": torch.arange(21, 21 + frames),
        }
        for name, places in past.items():
            found[f"latents_{name}"] = torch.randn(batch, 4, len(places), 2 * height, 2 * width)
            found[f"indices_latents_{name}"] = torch.tensor(places)
        return found

    return arguments


FRAMEPACK = Tiny(
    lambda: HunyuanVideoFramepackTransformer3DModel(
        **SIZES, has_image_proj=True, image_proj_dim=12, has_clean_x_embedder=True
    ),
    {
        "video": framepack(5, 8, 8),
        "odd, padded text": framepack(3, 7, 9, lengths=(9,)),
        "batch of 2, padded text": framepack(3, 7, 9, lengths=(9, 4)),
        "one frame": framepack(1, 12, 10),
    },
    touch=touch,
)


def test_parts_of_framepack():
    """The start image is the sink; without history it is the first frame of the section."""
    model, arguments = FRAMEPACK.made(), seeded(FRAMEPACK.inputs["odd, padded text"])
    history = (Grid(4, 2, 3, sink=None), Grid(1, 4, 5, sink=None), Grid(2, 7, 9))
    assert hunyuan_video._framepack(model, arguments) == (*history, Grid(3, 7, 9, sink=None), REST)
    alone = arguments | dict.fromkeys(("latents_clean", "latents_history_2x", "latents_history_4x"))
    assert hunyuan_video._framepack(model, alone) == (Grid(3, 7, 9), REST)


# -- HunyuanVideo 1.5 ----------------------------------------------------------------------------------


def hunyuan15(frames, height, width, lengths=(13,), lengths_2=(6,), image=False):
    def arguments():
        batch = len(lengths)
        return {
            "hidden_states": torch.randn(batch, 4, frames, height, width),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": torch.randn(batch, 13, 16),
            "encoder_attention_mask": valid(lengths, 13),
            "encoder_hidden_states_2": torch.randn(batch, 6, 12),
            "encoder_attention_mask_2": valid(lengths_2, 6),
            "image_embeds": torch.randn(batch, 5, 8) if image else torch.zeros(batch, 5, 8),
        }

    return arguments


def touch15(arguments):
    arguments["hidden_states"][0, :, 2, 2, 6] += 1
    return 2, 2, 6


HUNYUAN15 = Tiny(
    lambda: HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=3,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(8, 12, 12),
    ),
    {
        "video": hunyuan15(5, 8, 8),
        "odd, batch of 2, padded text": hunyuan15(3, 7, 9, lengths=(9, 4), lengths_2=(0, 5)),
        "one frame": hunyuan15(1, 12, 10),
        "no text of the second encoder": hunyuan15(5, 8, 8, lengths_2=(0,)),
        "an image": hunyuan15(5, 8, 8, lengths=(9,), image=True),
    },
    touch=touch15,
)


def test_no_mask_of_pairs(monkeypatch):
    """The processor of HunyuanVideo 1.5 asks for a mask of keys, also where a call stays dense."""
    shapes = []

    def spy(*args, attn_mask, **kwargs):
        shapes.append(tuple(attn_mask.shape))
        return attention_dispatch.dispatch_attention_fn(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(hunyuan_video, "dispatch_attention_fn", spy)
    model, arguments = HUNYUAN15.made(), seeded(HUNYUAN15.inputs["video"])
    with torch.no_grad(), apply_rainfusion(model, config(HUNYUAN15, sparsity=0.6, dense_layers=(0,))):
        model(**arguments)
    assert shapes == [(1, 1, 1, 320 + 24)] * 3


def test_dense_layers_are_as_before():
    model, arguments = HUNYUAN15.made(), seeded(HUNYUAN15.inputs["odd, batch of 2, padded text"])
    with torch.no_grad():
        untouched = first(model(**arguments))
        with apply_rainfusion(model, config(HUNYUAN15, sparsity=0.6, dense_layers=(0, 1, 2))):
            out = first(model(**arguments))
    assert torch.allclose(out, untouched, atol=1e-6)


FAMILIES = {
    "hunyuan": HUNYUAN,
    "token replace": TOKEN_REPLACE,
    "latent concat": LATENT_CONCAT,
    "framepack": FRAMEPACK,
    "hunyuan 1.5": HUNYUAN15,
}
CASES = [(family, name) for family, tiny in FAMILIES.items() for name in tiny.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_places(family):
    check_places(FAMILIES[family], "video")
