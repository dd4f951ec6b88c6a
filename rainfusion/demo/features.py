"""Frames become Q, K and V with the structure of a clip: alike where the clip is alike, near where it is near.

Patches are projected to their principal components; a query and a key of the same token see the same
features through one random rotation a head, so that tokens attend to what looks like them; rotary
embedding in time, height and width adds the preference for what is near, as in a video transformer.
"""

from __future__ import annotations

import math

import numpy as np

from rainfusion.core.errors import ProblemError
from rainfusion.core.windows import Sizes

COMPONENTS = 64
_SHARPNESS = (4.0, 16.0)  # logit of a token on itself, first head to last: from diffuse to peaked
_NOISE = 0.1
_ROTARY_BASE = 10_000.0
_MOST_BYTES = 2**35  # of Q, K and V together


def qkv(
    frames: np.ndarray,
    grid: Sizes,
    *,
    heads: int = 4,
    head_dim: int = 64,
    text: int = 0,
    text_position: str = "end",
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q, K and V of a clip, for the default scale ``head_dim ** -0.5``.

    Args:
        frames: RGB, uint8 ``[frames, height * patch, width * patch, 3]`` (see `decode`).
        grid: (frames, height, width) in tokens.
        heads: heads of rising sharpness, the first the most diffuse.
        head_dim: channels a head, even.
        text: random tokens that stand for a prompt, at `text_position`.
        seed: of the rotations, the noise and the text.

    Returns:
        q, k, v: float32 ``[1, heads, tokens, head_dim]``.

    Raises:
        ProblemError: as `check_size`.
    """
    check_size(math.prod(grid) + text, heads, head_dim)
    random = np.random.default_rng(seed)
    features = principal_components(patches(frames, grid), COMPONENTS)
    if text:
        prompt = random.standard_normal((text, features.shape[1])).astype(np.float32) * features.std(axis=0)
        features = np.concatenate([features, prompt] if text_position == "end" else [prompt, features])
    angles = rotary_angles(grid, head_dim, text, text_position)
    low, high = _SHARPNESS
    q, k, v = (np.empty((1, heads, len(features), head_dim), np.float32) for _ in range(3))
    for head, sharpness in enumerate(np.geomspace(low, high, heads)):
        shared, own = (_orthogonal(random, features.shape[1], head_dim) for _ in range(2))
        for x in (q, k):
            noisy = _unit(features) + _NOISE * _unit(random.standard_normal(features.shape, np.float32))
            x[0, head] = rotate(_unit(noisy) @ shared, angles) * math.sqrt(sharpness * math.sqrt(head_dim))
        v[0, head] = features / features.std() @ own
    return q, k, v


def check_size(tokens: int, heads: int, head_dim: int) -> None:
    """Refuse tensors that cannot be made, before anything is.

    Raises:
        ProblemError: an odd head_dim, or Q, K and V of more than 32 GiB together.
    """
    if head_dim % 2:
        raise ProblemError(f"head_dim={head_dim} is odd; rotary embedding turns channels in pairs, give an even number")
    size = 3 * 4 * heads * tokens * head_dim
    if size > _MOST_BYTES:
        raise ProblemError(
            f"Q, K and V of {tokens} tokens and {heads} heads of {head_dim} take {size:,} bytes; at most 32 GiB"
        )


def patches(frames: np.ndarray, grid: Sizes) -> np.ndarray:
    """The pixels of every token, float32 in [0, 1], ``[frames * height * width, patch * patch * 3]``."""
    count, height, width = grid
    p, r = frames.shape[1] // height, frames.shape[2] // width
    tiles = frames.reshape(count, height, p, width, r, 3).transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(count * height * width, p * r * 3).astype(np.float32) / 255


def principal_components(x: np.ndarray, components: int) -> np.ndarray:
    """The leading principal components of the rows of x, float32 ``[rows, min(components, columns)]``."""
    centred = x - x.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return np.asarray(centred @ vectors[:, ::-1][:, :components])


def rotary_angles(grid: Sizes, head_dim: int, text: int = 0, text_position: str = "end") -> np.ndarray:
    """Rotary angles of every token, float32 ``[tokens, head_dim / 2]``; text tokens are not rotated.

    The channel pairs are shared out over time, height and width as Wan does: a third each, time the rest.
    """
    space = head_dim // 6
    pairs = (head_dim // 2 - 2 * space, space, space)
    places = np.indices(grid).reshape(3, -1)
    axes = [
        place[:, None] * _ROTARY_BASE ** (-np.arange(n) / max(n, 1)) for place, n in zip(places, pairs, strict=True)
    ]
    angles = np.concatenate(axes, axis=1)
    padding = (0, text) if text_position == "end" else (text, 0)
    return np.pad(angles, (padding, (0, 0))).astype(np.float32)


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotate the channel pairs of x ``[tokens, channels]`` by angles ``[tokens, channels / 2]``."""
    even, odd, cos, sin = x[:, 0::2], x[:, 1::2], np.cos(angles), np.sin(angles)
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def _unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-6))


def _orthogonal(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A random map with orthonormal rows or columns, whichever are fewer, float32 ``[rows, columns]``."""
    q, r = np.linalg.qr(random.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.sign(np.diag(r))
    return (q if rows >= columns else q.T).astype(np.float32)
