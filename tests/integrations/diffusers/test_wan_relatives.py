"""Wan VACE, Wan Animate, SkyReels V2, ChronoEdit, AnyFlow: the video alone."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanVACETransformer3DModel,
)

from rainfusion.integrations.diffusers import UnknownModelError, apply_rainfusion
from rainfusion.integrations.diffusers.adapter import known
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, first, seeded
from tests.integrations.diffusers.pipelines import TINY


def latents(frames, height, width, batch=1, channels=4):
    return torch.randn(batch, channels, frames, 2 * height, 2 * width)


def common(batch=1, timestep=None):
    return {
        "timestep": torch.full((batch,), 500) if timestep is None else timestep,
        "encoder_hidden_states": torch.randn(batch, 7, 16),
    }


def plain(*sizes, batch=1, timestep=None, **others):
    return lambda: {"hidden_states": latents(*sizes, batch), **common(batch, timestep), **others}


def touch(arguments):
    arguments["hidden_states"][0, :, 2, 4, 13] += 1
    return 2, 2, 6


def touch_by_frame(arguments):
    arguments["hidden_states"][0, 2, :, 4, 13] += 1
    return 2, 2, 6


# -- VACE ----------------------------------------------------------------------------------------------


def vace(*sizes, batch=1, control_frames=None):
    def arguments():
        frames, *rest = sizes
        control = latents(control_frames or frames, *rest, batch, channels=6)
        return {
            "hidden_states": latents(*sizes, batch),
            **common(batch),
            "control_hidden_states": control,
            "control_hidden_states_scale": torch.tensor([1.0, 0.7]),
        }

    return arguments


VACE = Tiny(
    lambda: WanVACETransformer3DModel(**TINY, vace_layers=[0, 2], vace_in_channels=6),
    {
        "video": vace(5, 8, 8),
        "odd, batch of 2": vace(3, 7, 9, batch=2),
        "one frame": vace(1, 12, 10),
        "shorter control": vace(4, 6, 8, control_frames=3),
    },
    touch=touch,
)


# -- Animate -------------------------------------------------------------------------------------------


def animate(*sizes, batch=1):
    def arguments():
        frames, *rest = sizes
        return {
            "hidden_states": latents(*sizes, batch, channels=12),
            **common(batch),
            "encoder_hidden_states_image": torch.randn(batch, 5, 16),
            "pose_hidden_states": latents(frames - 1, *rest, batch),
            "face_pixel_values": torch.rand(batch, 3, 4 * (frames - 1) - 3, 16, 16),
        }

    return arguments


ANIMATE = Tiny(
    lambda: WanAnimateTransformer3DModel(
        **TINY | {"in_channels": 12},
        latent_channels=4,
        image_dim=16,
        added_kv_proj_dim=64,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=3,
    ),
    {"video": animate(5, 8, 8), "odd, batch of 2": animate(3, 7, 9, batch=2), "two frames": animate(2, 12, 10)},
    touch=touch,
)


# -- SkyReels ------------------------------------------------------------------------------------------


def forced(*sizes, batch=1):
    timestep = torch.arange(sizes[0] * batch).view(batch, -1) * 20 + 400
    return plain(*sizes, batch=batch, timestep=timestep, enable_diffusion_forcing=True, fps=[1])


SKYREELS = Tiny(
    lambda: SkyReelsV2Transformer3DModel(**TINY, inject_sample_info=True),
    {
        "video": plain(5, 8, 8, fps=[0]),
        "odd, batch of 2": plain(3, 7, 9, batch=2, fps=[0, 1]),
        "one frame": plain(1, 12, 10, fps=[0]),
        "diffusion forcing": forced(5, 8, 8),
        "diffusion forcing, batch of 2": forced(3, 7, 9, batch=2),
    },
    touch=touch,
)


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_block_causal_stays_dense():
    model, arguments = SKYREELS.made(), seeded(SKYREELS.inputs["diffusion forcing"])
    arguments["hidden_states"] = arguments["hidden_states"][:, :, :4]
    arguments["timestep"] = arguments["timestep"][:, :4]
    model._set_ar_attention(2)
    with torch.no_grad():
        untouched = first(model(**arguments))
        with apply_rainfusion(model, config(SKYREELS, sparsity=0.6)) as handle:
            assert torch.equal(first(model(**arguments)), untouched)
    assert handle.report().count(kind="dense") == 3
    assert "mask" in str(handle.report())


# -- ChronoEdit, AnyFlow -------------------------------------------------------------------------------

CHRONOEDIT = Tiny(
    # two frames are the first and the last of the 8 that temporal reasoning would have
    lambda: ChronoEditTransformer3DModel(**TINY | {"attention_head_dim": 36}, rope_temporal_skip_len=8),
    {
        "video": plain(5, 8, 8),
        "odd, batch of 2": plain(3, 7, 9, batch=2),
        "one frame": plain(1, 12, 10),
        "two frames": plain(2, 8, 9),
        "a timestep a token": plain(3, 8, 8, timestep=torch.arange(192)[None] * 5),
    },
    touch=touch,
)


def by_frame(*sizes, batch=1):
    def arguments():
        frames = sizes[0]
        timestep = torch.arange(frames * batch, dtype=torch.float32).view(batch, -1) * 20 + 400
        return {
            "hidden_states": latents(*sizes, batch).transpose(1, 2).contiguous(),
            **common(batch, timestep),
            "r_timestep": timestep - 100,
        }

    return arguments


ANYFLOW = Tiny(
    lambda: AnyFlowTransformer3DModel(**TINY),
    {"video": by_frame(5, 8, 8), "odd, batch of 2": by_frame(3, 7, 9, batch=2), "one frame": by_frame(1, 12, 10)},
    touch=touch_by_frame,
)

FAMILIES = {"vace": VACE, "animate": ANIMATE, "skyreels": SKYREELS, "chronoedit": CHRONOEDIT, "anyflow": ANYFLOW}


CASES = [(family, name) for family, tiny in FAMILIES.items() for name in tiny.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_places(family):
    check_places(FAMILIES[family], "video")


@pytest.mark.parametrize("name", ["WanAnimate2Transformer3DModel", "AnyFlowFARTransformer3DModel"])
def test_left_alone(name):
    model = type(name, (torch.nn.Module,), {})()
    with pytest.raises(UnknownModelError, match="is left as it is"):
        apply_rainfusion(model)
    assert name not in known()[0]
