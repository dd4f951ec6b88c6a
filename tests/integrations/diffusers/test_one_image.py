"""Families of one image and text, whose latents say how large the image is."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch

from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, seeded

TEXT = 11


def inputs(
    height, width, batch=1, *, channels=4, text_dim=16, names=("hidden_states", "encoder_hidden_states"), **more
):
    """Latents and text of a batch under these names, and more arguments, functions of the batch."""

    def arguments():
        given = {
            names[0]: torch.randn(batch, 4, 2 * height, 2 * width),
            names[1]: torch.randn(batch, TEXT, 16),
            "timestep": torch.full((batch,), 0.5),
        }
        if "timesteps" in more:
            del given["timestep"]
        return given | {name: make(batch, height, width) for name, make in more.items()}

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, :, 7, 10] += 1
    return 0, 3, 5


def tiny(name, settings, sizes=((16, 16), (13, 15)), **more):
    model = getattr(diffusers, name, None)
    (height, width), odd = sizes
    cases = {"image": inputs(height, width, **more), "odd, batch of 2": inputs(*odd, batch=2, **more)}
    return Tiny(lambda: model(**settings), cases, touch=touch)


def pair(batch, height, width):
    return torch.tensor([[2.0 * height, 2.0 * width]]).expand(batch, -1)


def zeros(batch, height, width):
    return torch.zeros(batch, 2)


def lengths(*valid):
    return lambda batch, height, width: torch.tensor(valid or (TEXT,) * batch)


def mask(*valid):
    return lambda batch, height, width: torch.arange(TEXT)[None] < torch.tensor(valid)[:, None]


SD3 = {
    "sample_size": 32,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 12,
    "out_channels": 4,
    "pos_embed_max_size": 32,
}
COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 4,
}
ERNIE = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_layers": 3,
    "ffn_hidden_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "text_in_dim": 16,
    "rope_axes_dim": (8, 12, 12),
}
PRX = {"in_channels": 4, "context_in_dim": 16, "hidden_size": 64, "num_heads": 2, "depth": 3, "axes_dim": [16, 16]}


LUMINA = {
    "in_channels": 4,
    "hidden_size": 64,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 16,
    "axes_dim_rope": (8, 12, 12),
    "axes_lens": (64, 32, 32),
    "cap_feat_dim": 16,
}


def same_lengths(batch, height, width):
    return torch.arange(TEXT).expand(batch, -1) < 9


def pooled(batch, height, width):
    return torch.randn(batch, 12)


def priors(batch, height, width):
    return torch.randint(0, 32, (batch, height * width))


def kept(batch, height, width):
    return torch.zeros(batch, height * width, dtype=torch.bool)


FAMILIES = {
    "Stable Diffusion 3": tiny("SD3Transformer2DModel", SD3, pooled_projections=pooled),
    "Stable Diffusion 3.5": tiny(
        "SD3Transformer2DModel",
        SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        pooled_projections=pooled,
    ),
    "AuraFlow": tiny(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 32,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 64,
            "pos_embed_max_size": 1024,
        },
    ),
    "CogView 3 Plus": tiny(
        "CogView3PlusTransformer2DModel",
        COGVIEW | {"pos_embed_max_size": 32},
        original_size=pair,
        target_size=pair,
        crop_coords=zeros,
    ),
    "CogView 4": tiny(
        "CogView4Transformer2DModel",
        COGVIEW | {"rope_axes_dim": (32, 32)},
        original_size=pair,
        target_size=pair,
        crop_coords=zeros,
    ),
    "GLM-Image": tiny(
        "GlmImageTransformer2DModel",
        COGVIEW | {"prior_vq_quantizer_codebook_size": 32},
        target_size=pair,
        crop_coords=zeros,
        prior_token_id=priors,
        prior_token_drop=kept,
    ),
    "ERNIE-Image": tiny(
        "ErnieImageTransformer2DModel", ERNIE, names=("hidden_states", "text_bth"), text_lens=lengths()
    ),
    "PRX": tiny("PRXTransformer2DModel", PRX),
    "PixArt": tiny(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "cross_attention_dim": 64,
            "sample_size": 32,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        added_cond_kwargs=lambda batch, height, width: {"resolution": None, "aspect_ratio": None},
    ),
    "Lumina 2": tiny("Lumina2Transformer2DModel", LUMINA, encoder_attention_mask=same_lengths),
    "HiDream": tiny(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "caption_channels": [16, 16],
            "text_emb_dim": 12,
            "axes_dims_rope": (8, 12, 12),
            "max_resolution": (32, 32),
            "llama_layers": [0, 1, 1, 0],
            "force_inference_output": True,
        },
        sizes=((16, 16), (17, 14)),
        names=("hidden_states", "encoder_hidden_states_t5"),
        encoder_hidden_states_llama3=lambda batch, height, width: torch.randn(2, batch, 7, 16),
        pooled_embeds=pooled,
        timesteps=lambda batch, height, width: torch.full((batch,), 500.0),
    ),
}
FAMILIES["ERNIE-Image"].inputs["padded text"] = inputs(
    13, 15, batch=3, names=("hidden_states", "text_bth"), text_lens=lengths(11, 4, 7)
)
FAMILIES["PRX"].inputs["padded text"] = inputs(13, 15, batch=3, attention_mask=mask(11, 4, 7))
CASES = [(family, name) for family, one in FAMILIES.items() for name in one.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_places(family):
    """Without refiners, in which the tokens of an image meet before the layers."""
    tiny = FAMILIES[family]
    if family == "Lumina 2":
        tiny = replace(tiny, make=lambda: diffusers.Lumina2Transformer2DModel(**LUMINA | {"num_refiner_layers": 0}))
    check_places(tiny, "odd, batch of 2")


def dense_reasons(family, **changed):
    """Why a forward with these arguments is dense; its result is that of the untouched model."""
    tiny = FAMILIES[family]
    model, given = tiny.made(), seeded(tiny.inputs["image"]) | changed
    with torch.no_grad():
        untouched = model(**given).sample
        with apply_rainfusion(model, config(tiny, sparsity=0.6)) as handle:
            out = model(**given).sample
    assert torch.equal(out, untouched)
    return {row.why for row in handle.report().rows if row.kind == "dense"}


def lumina_batch():
    return seeded(inputs(16, 16, batch=2, encoder_attention_mask=mask(11, 5)))


def test_what_stays_dense():
    assert dense_reasons("CogView 4", attention_mask=mask(7)(1, 0, 0)) == {"mask"}
    assert dense_reasons("GLM-Image", attention_mask=mask(7)(1, 0, 0)) == {"mask"}
    assert dense_reasons("PRX", attention_mask=~mask(7)(1, 0, 0)) == {"mask hides more than the end of the text"}
    assert dense_reasons("Lumina 2", **lumina_batch()) == {"mask"}
    assert dense_reasons("PRX", encoder_hidden_states=torch.randn(1, 33, 16)) == {"too many keys without a query"}


def joy_inputs(*sizes, batch=1, items=None):
    def arguments():
        axes = (batch, 4, *sizes) if items is None else (batch, items, 4, *sizes)
        return {
            "hidden_states": torch.randn(axes),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        }

    return arguments


def joy_touch(arguments):
    """A reference: the last item stands first in the sequence, the others after it."""
    arguments["hidden_states"][0, 1, :, 0, 7, 10] += 1
    return 0, 3, 5


JOY = Tiny(
    lambda: diffusers.JoyImageEditTransformer3DModel(
        in_channels=4,
        hidden_size=64,
        num_attention_heads=2,
        text_dim=16,
        num_layers=3,
        rope_dim_list=[8, 12, 12],
        rope_type="mrope",
    ),
    {
        "image": joy_inputs(1, 32, 32),
        "odd, batch of 2": joy_inputs(1, 26, 30, batch=2),
        "references": joy_inputs(1, 18, 22, items=3),
    },
    touch=joy_touch,
)


@pytest.mark.parametrize("name", JOY.inputs)
def test_joy_image(name):
    check_family(JOY, name)


def test_joy_image_places():
    check_places(JOY, "references")
