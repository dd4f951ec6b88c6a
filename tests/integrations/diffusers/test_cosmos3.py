"""Cosmos 3: video (and sound) attends to text and to all of itself; text attends to text."""

from __future__ import annotations

import pytest
import torch

from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, seeded

Cosmos3OmniTransformer = getattr(__import__("diffusers"), "Cosmos3OmniTransformer", None)
pytestmark = pytest.mark.skipif(Cosmos3OmniTransformer is None, reason="this diffusers has no Cosmos 3")

LAYERS, TEXT, SOUND = 3, 9, 6


def make():
    return Cosmos3OmniTransformer(
        head_dim=32,
        hidden_size=64,
        intermediate_size=64,
        latent_channel=4,
        num_attention_heads=4,
        num_hidden_layers=LAYERS,
        num_key_value_heads=2,
        patch_latent_dim=16,
        rope_axes_dim=(6, 5, 5),
        sound_dim=8,
        sound_gen=True,
        vocab_size=32,
    )


def inputs(frames, height, width, sound=False):
    def arguments():
        count = frames * height * width
        video, length = torch.arange(TEXT, TEXT + count), TEXT + count + sound * SOUND
        given = {
            "input_ids": torch.randint(0, 32, (TEXT,)),
            "text_indexes": torch.arange(TEXT),
            "position_ids": torch.arange(length).expand(3, -1) + torch.tensor([[0], [3], [5]]),
            "und_len": TEXT,
            "sequence_length": length,
            "vision_tokens": [torch.randn(1, 4, frames, 2 * height, 2 * width)],
            "vision_token_shapes": [(frames, height, width)],
            "vision_sequence_indexes": video,
            "vision_mse_loss_indexes": video,
            "vision_timesteps": torch.full((count,), 500.0),
            "vision_noisy_frame_indexes": [torch.arange(frames)],
        }
        if sound:
            places = torch.arange(TEXT + count, length)
            given |= {
                "sound_tokens": [torch.randn(8, SOUND)],
                "sound_token_shapes": [(SOUND, 1, 1)],
                "sound_sequence_indexes": places,
                "sound_mse_loss_indexes": places,
                "sound_timesteps": torch.full((SOUND,), 500.0),
                "sound_noisy_frame_indexes": [torch.arange(SOUND)],
            }
        return given

    return arguments


def touch(arguments):
    arguments["vision_tokens"][0][0, :, 2, 7, 10] += 1
    return 2, 3, 5


FAMILY = Tiny(
    make,
    {"video": inputs(5, 8, 8), "odd, with sound": inputs(5, 7, 9, sound=True)},
    dense_calls=LAYERS,
    touch=touch,
)


@pytest.mark.parametrize("name", FAMILY.inputs)
def test_family(name):
    check_family(FAMILY, name)


def test_places():
    check_places(FAMILY, "odd, with sound")


@pytest.mark.parametrize("case", ["causal", "another order"])
def test_what_stays_dense(case):
    model, given = FAMILY.made(), seeded(inputs(5, 8, 8))
    if case == "another order":
        given["vision_sequence_indexes"] = given["vision_sequence_indexes"].flip(0)
        given["vision_mse_loss_indexes"] = given["vision_sequence_indexes"]
    with torch.no_grad():
        untouched = model(**given).sample[0]
        with apply_rainfusion(model, config(FAMILY, sparsity=0.6)) as handle:
            out = model(**given).sample[0]
    report = handle.report()
    reasons = [row.why for row in report.rows if row.kind == "dense"]
    assert reasons.count("causal") == LAYERS
    assert torch.equal(out, untouched) == (case == "another order")
    assert reasons.count("the video does not follow the text") == (LAYERS if case == "another order" else 0)
    assert report.count(kind="sparse") == (0 if case == "another order" else LAYERS)
