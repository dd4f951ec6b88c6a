"""CogVideoX, EasyAnimate, Mochi: text and video in one sequence, by torch's own attention function."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, EasyAnimateTransformer3DModel, MochiTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, assert_close, check_family, check_places, config, first, seeded

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi's rotary table

# -- CogVideoX -----------------------------------------------------------------------------------------


def cogvideox(patch_t=None):
    return lambda: CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=3,
        patch_size=2,
        patch_size_t=patch_t,
        patch_bias=patch_t is None,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )


def cog_inputs(frames, height, width, batch=1, patch_t=1):
    def arguments():
        rotary = get_3d_rotary_pos_embed(32, ((0, 0), (height, width)), (height, width), frames)
        return {
            "hidden_states": torch.randn(batch, patch_t * frames, 4, 2 * height, 2 * width),
            "encoder_hidden_states": torch.randn(batch, 7, 16),
            "timestep": torch.full((batch,), 500),
            "image_rotary_emb": rotary,
        }

    return arguments


def touch_by_frame(arguments):
    arguments["hidden_states"][0, 2, :, 4, 13] += 1
    return 2, 2, 6


def touch_by_two_frames(arguments):
    arguments["hidden_states"][0, 5, :, 4, 13] += 1
    return 2, 2, 6


COGVIDEOX = Tiny(
    cogvideox(),
    {
        "video": cog_inputs(5, 8, 8),
        "odd, batch of 2": cog_inputs(3, 7, 9, batch=2),
        "one frame": cog_inputs(1, 12, 10),
    },
    touch=touch_by_frame,
)
COGVIDEOX_15 = Tiny(
    cogvideox(patch_t=2),
    {"video": cog_inputs(4, 6, 8, patch_t=2), "odd, batch of 2": cog_inputs(3, 7, 9, batch=2, patch_t=2)},
    touch=touch_by_two_frames,
)


# -- EasyAnimate ---------------------------------------------------------------------------------------


def easy_inputs(frames, height, width, batch=1, t5=False):
    def arguments():
        others = {"encoder_hidden_states_t5": torch.randn(batch, 5, 12)} if t5 else {}
        return {
            "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": torch.randn(batch, 7, 16),
            **others,
        }

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, :, 2, 4, 13] += 1
    return 2, 2, 6


EASYANIMATE = Tiny(
    lambda: EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        time_embed_dim=16,
        text_embed_dim=16,
        text_embed_dim_t5=12,
        num_layers=3,
        mmdit_layers=2,
        add_norm_text_encoder=False,
    ),
    {
        "video": easy_inputs(5, 8, 8),
        "odd, batch of 2": easy_inputs(3, 7, 9, batch=2),
        "one frame": easy_inputs(1, 12, 10),
        "two text encoders": easy_inputs(3, 8, 8, t5=True),
    },
    touch=touch,
)


# -- Mochi ---------------------------------------------------------------------------------------------


def make_mochi():
    model = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=3,
        pooled_projection_dim=32,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=16,
        max_sequence_length=9,
    )
    torch.nn.init.normal_(model.pos_frequencies)  # zeros: no rotation
    return model


def mochi_inputs(frames, height, width, lengths=(9,)):
    def arguments():
        batch = len(lengths)
        return {
            "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width),
            "encoder_hidden_states": torch.randn(batch, 9, 16),
            "timestep": torch.full((batch,), 500),
            "encoder_attention_mask": torch.arange(9)[None] < torch.tensor(lengths)[:, None],
        }

    return arguments


MOCHI = Tiny(
    make_mochi,
    {
        "video": mochi_inputs(5, 8, 8),
        "padded text": mochi_inputs(5, 6, 8, lengths=(4,)),
        "one frame": mochi_inputs(1, 12, 10),
    },
    touch=touch,
)
MOCHI_PAIR = Tiny(
    make_mochi,
    {
        "odd, batch of 2": mochi_inputs(3, 7, 9, lengths=(9, 9)),
        "several lengths": mochi_inputs(3, 7, 9, lengths=(9, 2)),
    },
    sparse_calls=6,  # a layer calls once a sample
)


def test_masks_of_samples_are_kept_apart():
    """Mochi's calls for two samples look alike; a mask that is used again is that of the same sample."""
    model, arguments = MOCHI_PAIR.made(), seeded(MOCHI_PAIR.inputs["odd, batch of 2"])

    def second_step(samples):
        taken = {name: value[samples] for name, value in arguments.items()}
        with torch.no_grad(), apply_rainfusion(model, config(MOCHI_PAIR, sparsity=0.6, refresh_every=2)) as handle:
            model(**taken)
            out = first(model(**taken | {"timestep": taken["timestep"] - 100}))
        return out, handle.report()

    both, report = second_step(slice(0, 2))
    assert (report.count(kind="sparse"), report.count(kind="reused")) == (6, 6)
    alone = [second_step(slice(sample, sample + 1))[0] for sample in range(2)]
    assert_close(both, torch.cat(alone), 2e-5)


FAMILIES = {
    "cogvideox": COGVIDEOX,
    "cogvideox 1.5": COGVIDEOX_15,
    "easyanimate": EASYANIMATE,
    "mochi": MOCHI,
    "mochi, batch of 2": MOCHI_PAIR,
}
CASES = [(family, name) for family, tiny in FAMILIES.items() for name in tiny.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


@pytest.mark.parametrize("family", [family for family, tiny in FAMILIES.items() if tiny.touch])
def test_places(family):
    check_places(FAMILIES[family], "video")
