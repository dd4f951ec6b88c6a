"""Grids of tokens, from what models are given.

What is read from a tensor is kept by the tensor: pipelines hand the same one to every step, and reading it waits for
its device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rainfusion.core.parts import Grid

Read = TypeVar("Read")

_kept: Any = WeakIdKeyDictionary()


def latent_grid(latents: Tensor, patch: Sequence[int]) -> Grid:
    """The tokens of latents ``[batch, channels, frames, height, width]``, cut into patches (t, h, w)."""
    frames, height, width = (size // step for size, step in zip(latents.shape[2:], patch, strict=True))
    return Grid(frames, height, width)


def image_grid(latents: Tensor, patch: int) -> Grid:
    """The tokens of latents ``[..., height, width]``, cut into square patches."""
    height, width = (size // patch for size in latents.shape[-2:])
    return Grid(1, height, width)


def once(tensor: Tensor, key: Hashable, read: Callable[[Tensor], Read]) -> Read:
    """What `read` says of a tensor's values; asked once as long as they stay what they are.

    Tensors made in inference mode do not tell when they change: they are read every time.
    """
    if tensor.is_inference():
        return read(tensor)
    version, found = _kept.get(tensor, (None, {}))
    if version != tensor._version:
        found = {}
        _kept[tensor] = tensor._version, found
    if key not in found:
        found[key] = read(tensor)
    answer: Read = found[key]
    return answer


def image_grids(ids: Tensor, start: int = 0) -> tuple[Grid, ...] | str:
    """The images that position ids ``[tokens, (image, row, column, ...)]`` number, one after another.

    A leading axis for samples may be there; the first counts. A reason as text where the ids number something else.

    Args:
        start: the first token of an image.
    """
    return once(ids, ("images", start), lambda ids: _image_grids(ids, start))


def _image_grids(ids: Tensor, start: int) -> tuple[Grid, ...] | str:
    place = (ids[0] if ids.ndim == 3 else ids)[start:].detach().cpu().double()
    images = rasters(place[:, 1], place[:, 2], place[:, 0])
    return "position ids number no whole images" if images is None else tuple(Grid(1, *image[1:]) for image in images)


class Raster(NamedTuple):
    """Consecutive tokens that fill an image row by row, and which token is the first."""

    start: int
    height: int
    width: int


def rasters(row: Tensor, column: Tensor, image: Tensor) -> list[Raster] | None:
    """The images that tokens fill: one begins where its number changes, or the place goes back.

    None where the tokens fill no whole images.
    """
    back = (row[1:] < row[:-1]) | ((row[1:] == row[:-1]) & (column[1:] <= column[:-1]))
    begins = (back | (image[1:] != image[:-1])).nonzero().flatten() + 1
    found = []
    for start, end in pairwise([0, *begins.tolist(), len(row)]):
        height, width = (len(torch.unique(axis[start:end])) for axis in (row, column))
        if height * width != end - start:
            return None
        found.append(Raster(start, height, width))
    return found


def hides_end_only(mask: Tensor | None, count: int | None = None) -> bool:
    """Whether a mask ``[batch, ..., tokens]``, True at valid tokens, hides nothing but the end of every sample.

    Args:
        count: of how many tokens in front, those of the text; default: of all.
    """
    return mask is None or once(mask, ("end", count), lambda mask: _hides_end_only(mask[..., :count]))


def _hides_end_only(mask: Tensor) -> bool:
    valid = mask.bool()
    return not bool((valid[..., 1:] & ~valid[..., :-1]).any())
