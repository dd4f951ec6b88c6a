"""Qwen-Image 2.1: a step that fills the cache, and steps that read it."""

from __future__ import annotations

from math import prod

import pytest
import torch

from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, seeded

Qwen21 = getattr(__import__("diffusers"), "QwenImage21Transformer2DModel", None)
pytestmark = pytest.mark.skipif(Qwen21 is None, reason="this diffusers has no Qwen-Image 2.1")


def make():
    return Qwen21(
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(8, 12, 12),
    )


def arguments_of(target, *conditions, batch=1, text=(5, 6), mask=None):
    """Text, condition images and text again; sizes in latent tokens, of which the text encoder sees a quarter."""
    images = [*conditions, target]
    slots = [torch.ones(prod(image) // 4) for image in conditions]
    before, after = torch.zeros(text[0]), torch.zeros(text[1])
    seen = torch.cat([before, *slots, after]).bool()
    return {
        "hidden_states": torch.randn(batch, sum(map(prod, images)), 8),
        "encoder_hidden_states": torch.randn(batch, len(seen), 16),
        "encoder_hidden_states_mask": None if mask is None else torch.arange(len(seen))[None] < len(seen) - mask,
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, *image) for image in images]] * batch,
        "img_mask": torch.cat([seen, torch.ones(prod(target) // 4).bool()]).expand(batch, -1),
    }


def filled(arguments):
    """A cache that a model has filled with the prefix of these arguments."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    model, cache = FAMILY.made(), QwenImage21KVCache(3)
    with torch.no_grad():
        model(**arguments, kv_cache=cache, kv_cache_mode="extract")
    return cache


def cached(*images, **more):
    def arguments():
        given = arguments_of(*images, **more)
        return given | {"kv_cache": filled(given), "kv_cache_mode": "cached"}

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, -18 * 20 + 3 * 20 + 5] += 1
    return 0, 3, 5


PADS = torch.tensor([[0], [4], [2]])
FAMILY = Tiny(
    make,
    {
        "image": cached((16, 16)),
        "batch of 2": cached((18, 20), batch=2),
        "padded text": cached((18, 20), batch=3, mask=PADS),
        "condition images": cached((18, 20), (4, 2), (4, 6)),
        "condition image, padded text": cached((18, 20), (4, 6), batch=3, mask=PADS),
    },
    touch=touch,
)


@pytest.mark.parametrize("name", FAMILY.inputs)
def test_family(name):
    check_family(FAMILY, name)


def test_places():
    check_places(FAMILY, "condition image, padded text")


@pytest.mark.parametrize(
    ("make_arguments", "why"),
    [
        (lambda: arguments_of((18, 20), (4, 6)), "not called"),
        (cached((16, 16), (8, 8)), "too many keys without a query"),
    ],
)
def test_what_stays_dense(make_arguments, why):
    """Without a filled cache, and where the prefix is long."""
    model, given = FAMILY.made(), seeded(make_arguments)
    with torch.no_grad():
        untouched = model(**given).sample
        with apply_rainfusion(model, config(FAMILY, sparsity=0.6)) as handle:
            out = model(**given).sample
    assert torch.equal(out, untouched)
    assert handle.report().count(kind="sparse") == 0
    assert {row.why for row in handle.report().rows} == {why}
