"""Helios: history of three rates in front of the chunk of video that is made."""

from __future__ import annotations

import pytest
import torch
from diffusers import HeliosTransformer3DModel

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers.models import helios
from tests.integrations.diffusers.families import Tiny, check_family, check_places, seeded


def make(**settings):
    return lambda: HeliosTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 64,
            "num_layers": 3,
            "rope_dim": (8, 12, 12),
        }
        | settings
    )


def inputs(frames, height, width, batch=1, history=True):
    past = {"short": [0, 18], "mid": [16, 17], "long": [*range(1, 16)]}

    def arguments():
        found = {
            "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width),
            "timestep": torch.full((batch,), 500),
            "encoder_hidden_states": torch.randn(batch, 7, 16),
        }
        for name, places in past.items() if history else ():
            found[f"latents_history_{name}"] = torch.randn(batch, 4, len(places), 2 * height, 2 * width)
            found[f"indices_latents_history_{name}"] = torch.tensor(places).expand(batch, -1)
            found["indices_hidden_states"] = torch.arange(19, 19 + frames).expand(batch, -1)
        return found

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, :, 2, 4, 13] += 1
    return 2, 2, 6


HELIOS = Tiny(
    make(),
    {
        "video": inputs(5, 8, 8),
        "odd, batch of 2": inputs(3, 7, 9, batch=2),
        "one frame": inputs(1, 12, 10),
        "no history": inputs(5, 8, 8, history=False),
    },
    touch=touch,
)
AMPLIFIED = Tiny(make(is_amplify_history=True, guidance_cross_attn=False), {"video": inputs(3, 8, 8)})
FAMILIES = {"helios": HELIOS, "amplified history": AMPLIFIED}
CASES = [(family, name) for family, tiny in FAMILIES.items() for name in tiny.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


@pytest.mark.parametrize("name", ["video", "no history"])
def test_places(name):
    check_places(HELIOS, name)


def test_parts():
    """The first frame of the short history is the sink; without history it is that of the chunk."""
    model, arguments = HELIOS.made(), seeded(HELIOS.inputs["odd, batch of 2"])
    history = (Grid(4, 2, 3, sink=None), Grid(1, 4, 5, sink=None), Grid(2, 7, 9))
    assert helios._parts(model, arguments) == (*history, Grid(3, 7, 9, sink=None))
    assert helios._parts(model, seeded(inputs(3, 7, 9, history=False)) | no_history()) == (Grid(3, 7, 9),)


def no_history():
    names = [f"latents_history_{name}" for name in ("short", "mid", "long")]
    return dict.fromkeys([*names, *(f"indices_{name}" for name in names)])
