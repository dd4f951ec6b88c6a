"""Grids of tokens, from what models are given.

What is read from a tensor is kept by the tensor: pipelines hand the same one to every step, and reading it waits for
its device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

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
    """What `read` says of a tensor's values; asked once as long as they stay what they are."""
    version = 0 if tensor.is_inference() else tensor._version
    if tensor not in _kept:
        _kept[tensor] = {}
    found: dict[Hashable, Any] = _kept[tensor]
    if (version, key) not in found:
        found[version, key] = read(tensor)
    answer: Read = found[version, key]
    return answer


def image_grids(ids: Tensor) -> tuple[Grid, ...] | str:
    """The images that position ids ``[tokens, (image, row, column, ...)]`` number, one after another.

    A leading axis for samples may be there; the first counts. A reason as text where the ids number something else.
    """
    return once(ids, "images", _image_grids)


def _image_grids(ids: Tensor) -> tuple[Grid, ...] | str:
    """Images begin where the image's number changes, or the place goes back."""
    place = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float64)
    image, row, column = place[:, 0], place[:, 1], place[:, 2]
    back = (row[1:] < row[:-1]) | ((row[1:] == row[:-1]) & (column[1:] <= column[:-1]))
    starts = [0, *(((image[1:] != image[:-1]) | back).nonzero().flatten() + 1).tolist(), len(place)]
    grids = []
    for start, stop in pairwise(starts):
        height, width = _raster(row[start:stop], column[start:stop])
        if height * width != stop - start:
            return "position ids number no whole images"
        grids.append(Grid(1, height, width))
    return tuple(grids)


def _raster(row: Tensor, column: Tensor) -> tuple[int, int]:
    """Height and width of an image of which rows and columns increase from token to token."""
    return len(torch.unique(row)), len(torch.unique(column))


def hides_end_only(mask: Tensor | None) -> bool:
    """Whether a mask ``[batch, tokens]``, True at valid tokens, hides nothing but the end of every sample."""
    return mask is None or once(mask, "end", _hides_end_only)


def _hides_end_only(mask: Tensor) -> bool:
    valid = mask.bool()
    return not bool((valid[:, 1:] & ~valid[:, :-1]).any())
