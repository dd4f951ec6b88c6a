"""Z-Image: the image, then text; Omni: texts, images, then features of images.

Texts and images are filled up to a multiple of 32 tokens by a learned token, which is attended to as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor

from rainfusion.core.parts import Grid, Part, Text
from rainfusion.integrations.diffusers.adapter import REST, Adapter, Arguments, Parts, register_adapter

_MULTIPLE: Final = 32


def _parts(model: Any, arguments: Arguments) -> Parts | str:
    images = arguments["x"]
    patch = arguments["f_patch_size"], arguments["patch_size"], arguments["patch_size"]
    if isinstance(images[0], list):
        return _omni(arguments, patch)
    if len({image.shape for image in images}) > 1:
        return "the images of the batch differ in size"
    return (*_image(images[0], patch), REST)


def _omni(arguments: Arguments, patch: tuple[int, int, int]) -> Parts | str:
    features = arguments["siglip_feats"] or [None] * len(arguments["x"])
    samples = zip(arguments["cap_feats"], arguments["x"], features, strict=True)
    sequences = {tuple(_sequence(*sample, patch)) for sample in samples}
    return "the samples of the batch differ in their parts" if len(sequences) > 1 else sequences.pop()


def _sequence(
    texts: list[Tensor], images: list[Tensor | None], features: list[Tensor | None] | None, patch: tuple[int, int, int]
) -> Iterator[Part]:
    yield Text(sum(_filled(len(text)) for text in texts))
    for image in images:
        yield from (Text(_MULTIPLE),) if image is None else _image(image, patch)
    counts = [0 if feature is None else feature.shape[0] * feature.shape[1] for feature in features or ()]
    yield Text(sum(_filled(count) or _MULTIPLE for count in counts))


def _image(image: Tensor, patch: tuple[int, int, int]) -> tuple[Part, ...]:
    frames, height, width = (size // step for size, step in zip(image.shape[1:], patch, strict=True))
    grid = Grid(frames, height, width)
    return grid, Text(_filled(grid.count) - grid.count)


def _filled(count: int) -> int:
    return count + -count % _MULTIPLE


register_adapter(
    "ZImageTransformer2DModel",
    Adapter(
        r"layers\.\d+\.attention",
        _parts,
        pads=True,
        timestep="t",
        family="Z-Image, Omni",
        tested="one image, batches of text of different lengths, several images",
    ),
)
