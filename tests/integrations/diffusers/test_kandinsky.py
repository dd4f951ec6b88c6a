"""Kandinsky 5 and 6: the video alone, channels last; reordered once a forward."""

from __future__ import annotations

import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel, Kandinsky6Transformer3DModel

from rainfusion.integrations.diffusers import UnknownModelError, apply_rainfusion
from tests.integrations.diffusers.families import Tiny, check_family, check_places, config, first

SIZES = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 32,
    "model_dim": 64,
    "ff_dim": 64,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (8, 12, 12),
    "visual_cond": False,
}


def common(frames, height, width, batch):
    return {
        "hidden_states": torch.randn(batch, frames, 2 * height, 2 * width, 4),
        "encoder_hidden_states": torch.randn(batch, 7, 16),
        "timestep": torch.full((batch,), 500.0),
        "pooled_projections": torch.randn(batch, 8),
    }


def touch(arguments):
    arguments["hidden_states"][0, 2, 4, 13] += 1
    return 2, 2, 6


def kandinsky5(frames, height, width, batch=1):
    positions = [torch.arange(size) for size in (frames, height, width)]
    return lambda: (
        common(frames, height, width, batch) | {"visual_rope_pos": positions, "text_rope_pos": torch.arange(7)}
    )


def kandinsky6(frames, height, width, batch=1, audio=False, types=False, reference=False):
    def arguments():
        found = common(frames + reference, height, width, batch)
        if audio:
            found["audio_hidden_states"] = torch.randn(batch, 9, 6)
        if types:
            found["visual_token_type_ids"] = torch.arange(frames + reference).expand(batch, -1) % 3
        if reference:
            places = torch.tensor([*range(frames), 0])
            found["visual_rope_pos"] = (places, torch.arange(height), torch.arange(width))
        return found

    return arguments


KANDINSKY5 = Tiny(
    lambda: Kandinsky5Transformer3DModel(**SIZES),
    {
        "video": kandinsky5(5, 8, 8),
        "odd, batch of 2": kandinsky5(3, 7, 9, batch=2),
        "one frame": kandinsky5(1, 12, 10),
    },
    touch=touch,
)
KANDINSKY6 = Tiny(
    lambda: Kandinsky6Transformer3DModel(
        **SIZES, in_audio_dim=6, out_audio_dim=6, visual_token_type_num_embeddings=3, ca_rope=True, cross_gates=True
    ),
    {
        "video": kandinsky6(5, 8, 8),
        "odd, batch of 2, audio": kandinsky6(3, 7, 9, batch=2, audio=True),
        "one frame": kandinsky6(1, 12, 10),
        "types of frames": kandinsky6(3, 8, 8, types=True),
        "a reference frame": kandinsky6(4, 6, 8, reference=True),
    },
    touch=touch,
)
FAMILIES = {"kandinsky 5": KANDINSKY5, "kandinsky 6": KANDINSKY6}
CASES = [(family, name) for family, tiny in FAMILIES.items() for name in tiny.inputs]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_family(family, name):
    check_family(FAMILIES[family], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_places(family):
    check_places(FAMILIES[family], "video")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_nabla_is_left_as_it_is():
    """The model's own sparse attention, with the backend that it asks for."""
    model, arguments = KANDINSKY5.made(), kandinsky5(2, 8, 16)()
    model.set_attention_backend("flex")
    sparse = {"to_fractal": True, "sta_mask": torch.eye(4, dtype=torch.bool)[None, None], "P": 0.3}
    with torch.no_grad():
        untouched = first(model(**arguments, sparse_params=sparse))
        with apply_rainfusion(model, config(KANDINSKY5, sparsity=0.6)) as handle:
            assert torch.equal(first(model(**arguments, sparse_params=sparse)), untouched)
    assert handle.report().count(kind="dense") == 3


@pytest.mark.parametrize(
    "name", ["Kandinsky6SRTransformer3DModel", "SanaVideoTransformer3DModel", "SanaWMTransformer3DModel"]
)
def test_left_alone(name):
    with pytest.raises(UnknownModelError, match="is left as it is"):
        apply_rainfusion(type(name, (torch.nn.Module,), {})())
