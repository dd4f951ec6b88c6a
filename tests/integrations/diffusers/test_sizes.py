"""What models' arguments say about grids."""

from __future__ import annotations

import gc

import pytest
import torch

from rainfusion.core.parts import Grid
from rainfusion.integrations.diffusers.models import _sizes
from rainfusion.integrations.diffusers.models._sizes import hides_end_only, image_grid, image_grids, once


def raster(height, width, number=0, first=0):
    rows = [(number, first + y, first + x, 0) for y in range(height) for x in range(width)]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize(
    ("ids", "grids"),
    [
        ([raster(5, 7)], [(5, 7)]),
        ([raster(5, 7), raster(3, 4, number=10), raster(6, 2, number=20)], [(5, 7), (3, 4), (6, 2)]),
        ([raster(5, 7), raster(3, 4)], [(5, 7), (3, 4)]),
        ([raster(2, 2, first=512), raster(1, 9, number=1)], [(2, 2), (1, 9)]),
        ([raster(1, 1)], [(1, 1)]),
    ],
)
def test_images(ids, grids):
    assert image_grids(torch.cat(ids)) == tuple(Grid(1, *grid) for grid in grids)
    assert image_grids(torch.cat(ids).expand(3, -1, -1)) == tuple(Grid(1, *grid) for grid in grids)


def test_a_part_of_an_image_is_none():
    assert image_grids(raster(5, 7)[:-1]) == "position ids number no whole images"


def test_a_scattered_image_is_none():
    assert image_grids(raster(5, 7)[torch.randperm(35)]) == "position ids number no whole images"


def test_latents_of_an_image():
    assert image_grid(torch.zeros(2, 16, 9, 12), 2) == Grid(1, 4, 6)


@pytest.mark.parametrize(
    ("mask", "answer"),
    [([[1, 1, 0], [1, 0, 0]], True), ([[1, 1, 1]], True), ([[1, 0, 1]], False), ([[0, 1, 1]], False)],
)
def test_masks(mask, answer):
    assert hides_end_only(torch.tensor(mask)) is answer


def test_read_once_until_the_tensor_changes():
    tensor, seen = torch.zeros(2), []

    def read(x):
        seen.append(x.sum().item())
        return seen[-1]

    assert [once(tensor, "sum", read) for _ in range(3)] == [0, 0, 0]
    assert len(seen) == 1
    tensor += 1
    assert once(tensor, "sum", read) == 2
    with torch.inference_mode():
        made = torch.ones(3)
    assert once(made, "sum", read) == once(made, "sum", read) == 3
    assert len(seen) == 4  # such a tensor does not tell when it changes


def test_forgets_with_the_tensor():
    before, tensor = len(_sizes._kept), torch.zeros(1)
    once(tensor, "sum", torch.sum)
    assert len(_sizes._kept) == before + 1
    del tensor
    gc.collect()
    assert len(_sizes._kept) == before
