"""Wan 2.1, 2.2: the video alone, reordered once a forward."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.integrations.diffusers.families import Tiny, check_family, check_places
from tests.integrations.diffusers.pipelines import TINY


def make(**settings):
    return WanTransformer3DModel(**TINY | settings)


def inputs(frames, height, width, batch=1, timesteps=None):
    def arguments():
        return {
            "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width),
            "timestep": torch.full((batch,), 500) if timesteps is None else timesteps(batch),
            "encoder_hidden_states": torch.randn(batch, 7, 16),
        }

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, :, 2, 4, 13] += 1
    return 2, 2, 6


WAN = Tiny(
    make,
    {
        "video": inputs(5, 8, 8),
        "odd, batch of 2": inputs(3, 7, 9, batch=2),
        "one frame": inputs(1, 12, 10),
        "a timestep a token": inputs(3, 8, 8, timesteps=lambda b: torch.arange(192).expand(b, -1) * 5),
    },
    touch=touch,
)


@pytest.mark.parametrize("name", WAN.inputs)
def test_family(name):
    check_family(WAN, name)


def test_places():
    check_places(WAN, "video")
