"""LTX-Video and LTX-2: the video as a sequence, with conditions beside it; reordered once a forward."""

from __future__ import annotations

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel, LTXVideoTransformer3DModel

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers import apply_rainfusion
from rainfusion.integrations.diffusers.models.ltx import _grid_at_the_end
from tests.integrations.diffusers.families import Tiny, assert_close, check_family, check_places, config, first, seeded

# -- LTX-Video -----------------------------------------------------------------------------------------


def make_ltx():
    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=3,
        caption_channels=16,
    )


def raster(frames, height, width):
    """Coordinates (time, row, column) of a grid, in pixels and seconds."""
    axes = [torch.arange(size) * scale for size, scale in ((frames, 8 / 25), (height, 32.0), (width, 32.0))]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def ltx(frames, height, width, batch=1, extra=0, by_token=False, coordinates=False):
    def arguments():
        tokens = extra + frames * height * width
        found = {
            "hidden_states": torch.randn(batch, tokens, 4),
            "encoder_hidden_states": torch.randn(batch, 7, 16),
            "timestep": torch.full((batch,), 500),
            "encoder_attention_mask": torch.arange(7)[None].expand(batch, -1) < 5,
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (1 / 25, 32, 32),
        }
        found["encoder_attention_mask"] = found["encoder_attention_mask"].long()
        if by_token:
            found["timestep"] = torch.arange(batch * tokens).view(batch, -1) % 97 * 10.0
        if coordinates or extra:
            front = 100 + 32 * torch.rand(3, extra)
            found["video_coords"] = torch.cat([front, raster(frames, height, width)], 1).expand(batch, -1, -1)
            found |= dict.fromkeys(("num_frames", "height", "width", "rope_interpolation_scale"))
        return found

    return arguments


def touch(arguments):
    before = arguments["hidden_states"].shape[1] - 5 * 8 * 8
    arguments["hidden_states"][0, before + 2 * 64 + 2 * 8 + 6] += 1
    return 2, 2, 6


LTX = Tiny(
    make_ltx,
    {
        "video": ltx(5, 8, 8),
        "odd, batch of 2": ltx(3, 7, 9, batch=2),
        "one frame": ltx(1, 12, 10),
        "a timestep a token": ltx(5, 8, 8, batch=2, by_token=True),
        "coordinates": ltx(5, 8, 8, coordinates=True),
        "conditions in front": ltx(5, 8, 8, extra=21, by_token=True),
    },
    touch=touch,
)


def test_without_a_grid_it_stays_dense():
    model, arguments = LTX.made(), seeded(LTX.inputs["coordinates"])
    arguments["video_coords"] = torch.rand(1, 3, 320)
    with torch.no_grad():
        untouched = first(model(**arguments))
        with apply_rainfusion(model, config(LTX, sparsity=0.6)) as handle:
            assert torch.equal(first(model(**arguments)), untouched)
    assert "give a grid" in str(handle.report())


def test_grid_of_coordinates():
    small, video = raster(2, 3, 4) + 7, raster(5, 7, 9)
    assert _grid_at_the_end(video) == Grid(5, 7, 9)
    assert _grid_at_the_end(torch.cat([small, video], 1)) == Grid(5, 7, 9)
    assert _grid_at_the_end(raster(1, 7, 9)) == Grid(1, 7, 9)
    assert _grid_at_the_end(raster(3, 7, 1)) == Grid(3, 7, 1)
    # conditions of the video's size are frames of it, at whatever time they are
    later, earlier = torch.tensor([[40.0], [0], [0]]), torch.tensor([[-1.0], [0], [0]])
    before, after = raster(1, 7, 9) + later, raster(1, 7, 9) + earlier
    assert _grid_at_the_end(torch.cat([small, before, video, after], 1)) == Grid(7, 7, 9)
    assert _grid_at_the_end(raster(2, 4, 4)[:, torch.randperm(32)]) is None


# -- LTX-2 ---------------------------------------------------------------------------------------------


def ltx2_model(**settings):
    return lambda: LTX2VideoTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "cross_attention_dim": 64,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 16,
            "audio_cross_attention_dim": 32,
            "num_layers": 3,
            "caption_channels": 16,
            "rope_double_precision": False,
        }
        | settings
    )


def ltx2(frames, height, width, batch=1, extra=0, by_token=False, **others):
    def arguments():
        tokens = frames * height * width + extra
        timestep = torch.arange(batch * tokens).view(batch, -1) % 97 * 10.0 if by_token else torch.full((batch,), 500.0)
        start = 32 * torch.rand(batch, 3, tokens, 1)
        coordinates = {"video_coords": torch.cat([start, start + 1], -1)} if extra else {}
        return {
            "hidden_states": torch.randn(batch, tokens, 4),
            "audio_hidden_states": torch.randn(batch, 11, 4),
            "encoder_hidden_states": torch.randn(batch, 7, 16),
            "audio_encoder_hidden_states": torch.randn(batch, 7, 16),
            "timestep": timestep,
            "audio_timestep": torch.full((batch,), 500.0),
            "sigma": torch.full((batch,), 500.0),
            "num_frames": frames,
            "height": height,
            "width": width,
            "audio_num_frames": 11,
            **coordinates,
            **others,
        }

    return arguments


def ltx2_by_coordinates(frames, height, width, extra):
    def arguments():
        start = torch.cat([raster(frames, height, width), 100 + 32 * torch.rand(3, extra)], 1)[None, ..., None]
        none = dict.fromkeys(("num_frames", "height", "width"))
        return ltx2(frames, height, width, extra=extra)() | none | {"video_coords": torch.cat([start, start + 1], -1)}

    return arguments


def touch2(arguments):
    arguments["hidden_states"][0, 2 * 64 + 2 * 8 + 6] += 1
    return 2, 2, 6


def keyframes(tokens):
    return (torch.arange(tokens)[None, :, None] < 64).float()


LTX2 = Tiny(
    ltx2_model(use_keyframes_abs_pos_embedding=True),
    {
        "video": ltx2(5, 8, 8),
        "odd, batch of 2": ltx2(3, 7, 9, batch=2),
        "one frame": ltx2(1, 12, 10),
        "a timestep a token, keyframes": ltx2(5, 8, 8, by_token=True, video_keyframes_mask=keyframes(320)),
        "conditions behind": ltx2(5, 8, 8, extra=21, by_token=True),
        "coordinates": ltx2_by_coordinates(5, 8, 8, extra=21),
        "no audio crosses": ltx2(5, 8, 8, isolate_modalities=True),
    },
    touch=touch2,
)
PERTURBED = {"rope_type": "split", "perturbed_attn": True, "gated_attn": True}
LTX2_SPLIT = Tiny(
    ltx2_model(**PERTURBED),
    {
        "split rotary": ltx2(5, 8, 8, by_token=True),
        "one sample perturbed": ltx2(
            3, 7, 9, batch=2, spatio_temporal_guidance_blocks=[1], perturbation_mask=torch.tensor([1.0, 0.0])
        ),
    },
)
LTX2_SKIPS = Tiny(
    ltx2_model(**PERTURBED), {"one layer skips": ltx2(5, 8, 8, spatio_temporal_guidance_blocks=[1])}, sparse_calls=2
)


def test_a_skipped_layer_is_reported():
    model, arguments = LTX2_SKIPS.made(), seeded(LTX2_SKIPS.inputs["one layer skips"])
    with torch.no_grad(), apply_rainfusion(model, config(LTX2_SKIPS, sparsity=0.6)) as handle:
        model(**arguments)
    assert handle.report().count(kind="skipped") == 1


def test_a_mask_of_pairs_stays_dense():
    mask = torch.rand(1, 320, 320, generator=torch.Generator().manual_seed(2))
    model, arguments = LTX2.made(), seeded(LTX2.inputs["video"]) | {"video_self_attention_mask": mask}
    with torch.no_grad():
        untouched = first(model(**arguments))
        with apply_rainfusion(model, config(LTX2, sparsity=0.6)) as handle:
            assert torch.equal(first(model(**arguments)), untouched)
    assert handle.report().count(kind="dense") == 3
    assert "mask" in str(handle.report())


def test_audio_is_as_without_reordering():
    model, arguments = LTX2.made(), seeded(LTX2.inputs["video"])
    with torch.no_grad():
        audio = []
        for order in ("auto", "layer"):
            with apply_rainfusion(model, config(LTX2, sparsity=0.6, order=order)):
                audio.append(model(**arguments).audio_sample)
    assert_close(*audio, 2e-5)


FAMILIES = {"ltx": LTX, "ltx2": LTX2, "ltx2, split rotary": LTX2_SPLIT, "ltx2, skips": LTX2_SKIPS}
CASES = [(family, name) for family, tiny in FAMILIES.items() for name in tiny.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("ltx", "video"),
        ("ltx", "conditions in front"),
        ("ltx2", "video"),
        ("ltx2", "conditions behind"),
        ("ltx2", "coordinates"),
    ],
)
def test_places(family, name):
    check_places(FAMILIES[family], name)
