"""Moving textured shapes: videos whose every pixel follows from a text and one frame, so that ground truth exists.

A scene is a textured background that pans (it wraps around) and three textured shapes that move and bounce. The text
tells colours, shapes, sizes, places and motions; textures are in no text: a model has to take them from the frame it
is given, wherever that stands in the video, and move them along.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SHAPES = 3
_WAVES, _SHAPE_WAVES = 6, 3
_KINDS = (2.0, 8.0, 1.0)  # exponents of a superellipse: a disc, a square, a diamond
_OCTAVES = 5
_NUMBERS = 11
TEXT_TOKENS = 1 + SHAPES
TEXT_DIM = 4 + _NUMBERS * (1 + 2 * _OCTAVES) + len(_KINDS)
_SPEED = 0.02


@dataclass
class Scenes:
    """A batch of scenes. Lengths in widths of the picture, times in frames, colours in [0, 1].

    Attributes:
        colour, slope: of the background ``[B, 3]``, and how it changes over the picture ``[B, 3, 2]``.
        pan: motion of the background ``[B, 2]``.
        waves, phases, tints: of the background's texture ``[B, waves, 2]``, ``[B, waves]``, ``[B, waves, 3]``.
        place, motion: of the shapes at frame 0, ``[B, shapes, 2]``.
        size, kind: of the shapes ``[B, shapes]``.
        paint: colour of the shapes ``[B, shapes, 3]``.
        shape_waves, shape_phases, shape_tints: of the shapes' textures.
    """

    colour: Tensor
    slope: Tensor
    pan: Tensor
    waves: Tensor
    phases: Tensor
    tints: Tensor
    place: Tensor
    motion: Tensor
    size: Tensor
    kind: Tensor
    paint: Tensor
    shape_waves: Tensor
    shape_phases: Tensor
    shape_tints: Tensor

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on a device."""
        return Scenes(*(getattr(self, f.name).to(device) for f in fields(self)))


def draw(batch: int, generator: torch.Generator) -> Scenes:
    """Random scenes, on the generator's device."""
    device = generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, device=device, generator=generator)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, (batch, *shape), device=device, generator=generator).float()

    turn = 2 * torch.pi
    across = whole(0, 3, _WAVES, 1)
    down = torch.where(across == 0, whole(1, 3, _WAVES, 1), whole(-3, 3, _WAVES, 1))
    return Scenes(
        colour=uniform(0.25, 0.75, 3),
        slope=uniform(-0.2, 0.2, 3, 2),
        pan=uniform(-_SPEED, _SPEED, 2),
        waves=torch.cat([across, down], dim=-1),
        phases=uniform(0, turn, _WAVES),
        tints=uniform(-0.1, 0.1, _WAVES, 3),
        place=uniform(0.15, 0.85, SHAPES, 2),
        motion=uniform(-_SPEED, _SPEED, SHAPES, 2),
        size=uniform(0.12, 0.22, SHAPES),
        kind=whole(0, len(_KINDS) - 1, SHAPES).long(),
        paint=uniform(0.1, 0.9, SHAPES, 3),
        shape_waves=uniform(-6, 6, SHAPES, _SHAPE_WAVES, 2),
        shape_phases=uniform(0, turn, SHAPES, _SHAPE_WAVES),
        shape_tints=uniform(-0.15, 0.15, SHAPES, _SHAPE_WAVES, 3),
    )


def text(scenes: Scenes) -> Tensor:
    """What the text says of scenes: ``[B, 1 + shapes, TEXT_DIM]``, one token for the background and one a shape."""
    batch, device = scenes.colour.shape[0], scenes.colour.device
    background = torch.cat([scenes.colour, scenes.slope.flatten(1) / 0.2, scenes.pan / _SPEED], dim=-1)
    kinds = torch.nn.functional.one_hot(scenes.kind, len(_KINDS)).float()
    shapes = torch.cat([scenes.place * 2 - 1, scenes.motion / _SPEED, scenes.size[..., None] * 5, scenes.paint], dim=-1)
    shapes = torch.nn.functional.pad(shapes, (0, _NUMBERS - shapes.shape[-1]))
    numbers = torch.cat([background[:, None], shapes], dim=1)
    octaves = torch.pi * 2.0 ** torch.arange(_OCTAVES, device=device)
    angles = (numbers[..., None] * octaves).flatten(2)
    which = torch.eye(TEXT_TOKENS, device=device).expand(batch, -1, -1)
    kinds = torch.cat([torch.zeros_like(kinds[:, :1]), kinds], dim=1)
    return torch.cat([which, numbers, angles.sin(), angles.cos(), kinds], dim=-1)


def render(scenes: Scenes, frames: int, height: int, width: int) -> Tensor:
    """Videos ``[B, 3, frames, height, width]`` in [-1, 1], from frame 0 on."""
    device = scenes.colour.device
    times = torch.arange(frames, device=device, dtype=torch.float32)
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    picture = _background(scenes, times, x, y)
    for shape in range(SHAPES):
        picture = _over(picture, scenes, shape, times, x, y, edge=1.5 / height)
    return picture.clamp(0, 1) * 2 - 1


def _background(scenes: Scenes, times: Tensor, x: Tensor, y: Tensor) -> Tensor:
    moved = scenes.pan[:, None] * times[:, None]  # [B, F, 2]
    waves = 2 * torch.pi * scenes.waves
    angle = _angles(waves, x - moved[..., :1], y - moved[..., 1:]) + scenes.phases[:, :, None, None, None]
    texture = torch.einsum("bnc,bnfhw->bcfhw", scenes.tints, angle.cos())
    slope = scenes.slope[..., 0, None, None] * (x - 0.5) + scenes.slope[..., 1, None, None] * (y[:, None] - 0.5)
    return scenes.colour[:, :, None, None, None] + slope[:, :, None] + texture


def _over(picture: Tensor, scenes: Scenes, shape: int, times: Tensor, x: Tensor, y: Tensor, *, edge: float) -> Tensor:
    """The picture with a shape on it."""
    place = _bounced(scenes.place[:, shape, None] + scenes.motion[:, shape, None] * times[:, None])
    dx, dy = x - place[..., :1], y - place[..., 1:]
    size = scenes.size[:, shape, None, None, None]
    power = torch.tensor(_KINDS, device=x.device)[scenes.kind[:, shape], None, None, None]
    far = ((dx[:, :, None, :].abs() / size).pow(power) + (dy[..., None].abs() / size).pow(power) + 1e-12).pow(1 / power)
    inside = torch.sigmoid((1 - far) * size / edge * 4)[:, None]
    angle = (
        _angles(2 * torch.pi * scenes.shape_waves[:, shape], dx, dy)
        + scenes.shape_phases[:, shape, :, None, None, None]
    )
    texture = torch.einsum("bnc,bnfhw->bcfhw", scenes.shape_tints[:, shape], angle.cos())
    painted = scenes.paint[:, shape, :, None, None, None] + texture
    return picture + inside * (painted - picture)


def _angles(waves: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """``[B, waves, F, H, W]`` of waves ``[B, waves, 2]`` over places ``[B, F, W]`` and ``[B, F, H]``."""
    across = waves[:, :, None, None, None, 0] * dx[:, None, :, None, :]
    return across + waves[:, :, None, None, None, 1] * dy[:, None, :, :, None]


def _bounced(place: Tensor) -> Tensor:
    """Places that went over an edge, reflected."""
    folded = place.remainder(2)
    return torch.where(folded > 1, 2 - folded, folded)
