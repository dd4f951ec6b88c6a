"""Flux 2 and Klein: text, an image and references; with a cache of keys the forward stays dense."""

from __future__ import annotations

from math import prod

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, seeded

TEXT = 11


def make(cached=False):
    model = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    for block in model.transformer_blocks if cached else ():
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks if cached else ():
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


def ids(images, times):
    rows = [
        (time, row, column, 0)
        for time, (height, width) in zip(times, images, strict=True)
        for row in range(height)
        for column in range(width)
    ]
    return torch.tensor(rows)


def inputs(*images, batch=1, times=(0, 10, 20)):
    def arguments():
        return {
            "hidden_states": torch.randn(batch, sum(map(prod, images)), 8),
            "encoder_hidden_states": torch.randn(batch, TEXT, 16),
            "timestep": torch.full((batch,), 0.5),
            "img_ids": ids(images, times[: len(images)]).expand(batch, -1, -1),
            "txt_ids": ids([(1, TEXT)], [0]).expand(batch, -1, -1)[..., [0, 1, 3, 2]],
        }

    return arguments


def touch(arguments):
    arguments["hidden_states"][0, 13 * 15 + 9 * 11 + 3 * 8 + 5] += 1
    return 0, 3, 5


FLUX2 = Tiny(
    make,
    {
        "image": inputs((16, 16)),
        "odd, batch of 2": inputs((13, 15), batch=2),
        "references": inputs((13, 15), (9, 11), (8, 8)),
        "references, batch of 2": inputs((13, 15), (9, 11), batch=2),
    },
    touch=touch,
)


@pytest.mark.parametrize("name", FLUX2.inputs)
def test_family(name):
    check_family(FLUX2, name)


def test_places():
    check_places(FLUX2, "references")


def test_processors_with_a_cache_are_sparse_without_references():
    check_family(Tiny(lambda: make(cached=True), FLUX2.inputs), "image")


def test_a_cache_of_keys_stays_dense():
    """The first step fills the cache (two calls a layer), the next has fewer queries than keys."""
    reference, image = (9, 11), (13, 15)
    first = inputs(reference, image, times=(10, 0))
    model = make(cached=True).eval()

    def two_steps():
        with torch.no_grad():
            filled = model(**seeded(first), kv_cache_mode="extract", num_ref_tokens=prod(reference))
            later = model(**seeded(inputs(image)), kv_cache_mode="cached", kv_cache=filled.kv_cache)
        return filled.sample, later.sample

    untouched = two_steps()
    with apply_rainfusion(model, config(FLUX2, sparsity=0.6)) as handle:
        out = two_steps()
    assert all(map(torch.equal, out, untouched))
    assert handle.report().count(kind="sparse") == 0
    assert {row.why for row in handle.report().rows} == {
        "references attend to themselves alone",
        "q and k differ in length",
    }
