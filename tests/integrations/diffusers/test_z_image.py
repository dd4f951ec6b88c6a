"""Z-Image: image and text, each filled up to a multiple of 32 tokens; Omni: several images."""

from __future__ import annotations

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from rainfusion.integrations.diffusers import apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, seeded


def make(refiners=1, **settings):
    return ZImageTransformer2DModel(
        in_channels=16,
        dim=64,
        n_layers=3,
        n_refiner_layers=refiners,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 12, 12],
        axes_lens=[512, 64, 64],
        **settings,
    )


def image(height, width):
    return torch.randn(16, 1, 2 * height, 2 * width)


def inputs(height, width, texts=(20,)):
    def arguments():
        return {
            "x": [image(height, width) for _ in texts],
            "t": torch.full((len(texts),), 0.5),
            "cap_feats": [torch.randn(text, 16) for text in texts],
        }

    return arguments


def omni(*images, texts=(20, 40, 7), features=None, batch=1):
    """Condition images first, the image to make last; features of an image of (height, width) patches, or None."""

    def arguments():
        given = [[None if i is None else image(*i) for i in images] for _ in range(batch)]
        seen = None if features is None else [None if f is None else torch.randn(*f, 12) for f in features]
        return {
            "x": given,
            "t": torch.full((batch,), 0.5),
            "cap_feats": [[torch.randn(text, 16) for text in texts]] * batch,
            "siglip_feats": [seen] * batch,
            "image_noise_mask": [[0] * (len(images) - 1) + [1]] * batch,
        }

    return arguments


def touch(arguments):
    sample = arguments["x"][0]
    latents = sample[-1] if isinstance(sample, list) else sample
    latents[:, 0, 2 * 3 + 1, 2 * 5] += 1
    return 0, 3, 5


Z_IMAGE = Tiny(
    make,
    {
        "image": inputs(20, 20),
        "odd, batch of 2": inputs(17, 23, texts=(20, 31)),
        "texts of different lengths": inputs(19, 21, texts=(20, 40, 33)),
    },
    touch=touch,
)
OMNI = Tiny(
    lambda: make(siglip_feat_dim=12),
    {
        "images": omni((20, 20), (15, 16), (19, 20)),
        "features": omni((20, 20), (19, 20), texts=(20, 40), features=[(3, 5), None]),
        "an image left out, batch of 2": omni(None, (21, 23), texts=(20, 7), batch=2),
    },
    touch=touch,
)


@pytest.mark.parametrize("name", Z_IMAGE.inputs)
def test_family(name):
    check_family(Z_IMAGE, name)


@pytest.mark.parametrize("name", OMNI.inputs)
def test_omni(name):
    check_family(OMNI, name)


@pytest.mark.parametrize(("siglip", "name"), [(None, "odd, batch of 2"), (12, "images"), (12, "features")])
def test_places(siglip, name):
    """Without refiners, in which the tokens of an image meet before the layers."""
    tiny = OMNI if siglip else Z_IMAGE
    check_places(Tiny(lambda: make(refiners=0, siglip_feat_dim=siglip), tiny.inputs, touch=touch), name)


@pytest.mark.parametrize(
    ("tiny", "arguments", "why"),
    [
        (Z_IMAGE, lambda: inputs(9, 9)() | {"x": [image(9, 9), image(12, 8)], "t": torch.ones(2)}, "differ in size"),
        (OMNI, omni((9, 9), texts=(20, 4), batch=2), "differ in their parts"),
    ],
)
def test_samples_that_differ_stay_dense(tiny, arguments, why):
    model, given = tiny.made(), seeded(arguments)
    texts = given["cap_feats"]
    given["cap_feats"] = [texts[0], texts[0]] if tiny is Z_IMAGE else [texts[0], [torch.randn(50, 16)] * 2]
    with torch.no_grad():
        untouched = model(**given).sample
        with apply_rainfusion(model, config(tiny, sparsity=0.6)) as handle:
            out = model(**given).sample
    assert all(map(torch.equal, out, untouched))
    assert {row.why.endswith(why) for row in handle.report().rows} == {True}
