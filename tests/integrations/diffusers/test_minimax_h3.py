"""MiniMax-H3: packed sequences as its pipelines build them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rainfusion.core.parts import Grid, Text
from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, seeded

H3 = getattr(__import__("diffusers"), "MiniMaxH3Transformer3DModel", None)
pytestmark = pytest.mark.skipif(H3 is None, reason="this diffusers has no MiniMax-H3")

TEXT = 9
PACKING = {"num_audio_latents": 4, "patch_size": (1, 2, 2), "audio_channels": 2, "audio_tag": 2, "video_tag": 0}


def make():
    return H3(
        num_attention_heads=2,
        attention_head_dim=32,
        hidden_size=48,
        num_layers=3,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=6,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=32,
        rope_freq_dim=4,
    )


def layout(frames, height, width, keyframes=(), references=()):
    """The tensors of a packed sequence; references are (kind, sizes in tokens)."""
    from diffusers.modular_pipelines.minimax_h3 import before_denoise

    sizes = {"num_latent_frames": frames, "latent_height": 2 * height, "latent_width": 2 * width}
    tags = torch.ones(TEXT, dtype=torch.long)
    if not references:
        build = before_denoise.MiniMaxH3PrepareLayoutStep.build_packed_sequence
        return build(tags, **sizes, **PACKING, keyframe_anchors=keyframes)[:5]
    seen = [torch.zeros(1, 4, f, 2 * h, 2 * w) for kind, (f, h, w) in references if kind != "audio"]
    return before_denoise.MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        tags,
        references=[SimpleNamespace(kind=kind, has_audio=kind == "video") for kind, _ in references],
        condition_latents=seen,
        audio_condition_latents=[torch.zeros(6, 6) for kind, _ in references if kind != "image"],
        **sizes,
        **PACKING,
    )[:5]


def inputs(*sizes, batch=1, **more):
    def arguments():
        places, tags, video, audio, text = layout(*sizes, **more)
        return {
            "hidden_states": torch.randn(batch, len(video), 16),
            "audio_hidden_states": torch.randn(batch, len(audio), 6),
            "encoder_hidden_states": torch.randn(batch, len(text), 16),
            "timestep": torch.tensor([0.5]),
            "timestep_indices": torch.zeros_like(tags),
            "token_tags": tags,
            "position_ids": places,
            "video_indices": video,
            "audio_indices": audio,
            "text_indices": text,
        }

    return arguments


def touch(arguments):
    video = arguments["hidden_states"]
    video[0, video.shape[1] - 5 * 7 * 9 + (2 * 7 + 3) * 9 + 5] += 1
    return 2, 3, 5


REFERENCES = ("image", (1, 6, 10)), ("image", (1, 8, 5)), ("video", (3, 4, 8)), ("audio", (0, 0, 0))
FAMILY = Tiny(
    make,
    {
        "video and audio": inputs(5, 7, 9),
        "batch of 2": inputs(3, 8, 10, batch=2),
        "key frames": inputs(5, 7, 9, keyframes=("first", "last")),
        "references": inputs(5, 7, 9, references=REFERENCES),
    },
    touch=touch,
)


@pytest.mark.parametrize("name", FAMILY.inputs)
def test_family(name):
    check_family(FAMILY, name)


@pytest.mark.parametrize("name", ["video and audio", "key frames", "references"])
def test_places(name):
    check_places(FAMILY, name)


def parts_of(**more):
    from rainfusion.integrations.diffusers.models.minimax_h3 import _parts

    return _parts(None, seeded(inputs(5, 7, 9, **more)))


def test_parts():
    """References have no sink, the video has."""
    video = Grid(5, 7, 9)
    assert parts_of() == (Text(TEXT), Text(8), video)
    assert parts_of(keyframes=("last",)) == (Text(TEXT), Grid(1, 7, 9, sink=None), Text(8), video)
    assert parts_of(references=REFERENCES) == (
        Text(TEXT),
        Grid(1, 6, 10, sink=None),
        Grid(1, 8, 5, sink=None),
        Text(6),
        Grid(3, 4, 8, sink=None),
        Text(6 + 8),
        video,
    )


def test_positions_that_are_no_videos_stay_dense():
    model, given = FAMILY.made(), seeded(inputs(5, 7, 9))
    given["position_ids"][-1] = given["position_ids"][-2]
    with torch.no_grad():
        untouched = model(**given).sample
        with apply_rainfusion(model, config(FAMILY, sparsity=0.6)) as handle:
            out = model(**given).sample
    assert torch.equal(out, untouched)
    assert {row.why for row in handle.report().rows} == {"positions describe no whole videos"}
