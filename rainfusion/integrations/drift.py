"""Drift: how far the queries and keys of a head have moved since its mask was made.

A mask is selected by the means of blocks, so the change of these means tells when it has grown old. The drift of a
head is ``|m - r| / |r|`` of its query means plus the same of its key means, where r are the means when the mask was
made. The idea is HASTE's (arXiv 2605.14513), of which only the abstract is public; this measure of it is ours.

Means over all tokens would cost more than the selection that is saved. A sample of the unprotected blocks is looked
at: one of every 8, and of short sequences at least 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import device as device_of

from rainfusion.core.arrays import namespace
from rainfusion.core.layout import TokenLayout
from rainfusion.core.ops.means import compute_dtype
from rainfusion.dispatch import LruDict

Array = Any

_EVERY = 8
_FEWEST = 4
_GOLDEN = (5**0.5 - 1) / 2
_TINY = 1e-30


class Means(NamedTuple):
    """Means of the sampled blocks in the dtype of the tokens, ``[batch, blocks, query heads, head_dim]`` each."""

    q: Array
    k: Array


class Sampler:
    """Takes means over the sample; keeps where the sampled tokens of the newest layouts stand, on the device."""

    def __init__(self) -> None:
        self._indices: LruDict[Array] = LruDict(32)

    def means(self, q: Array, k: Array, layout: TokenLayout, order: str) -> Means:
        """The means of a call, key means repeated for the query heads that share them.

        Args:
            q, k: ``[batch, tokens, heads, head_dim]``.
            order: ``"given"`` where the tokens stand in block order, else ``"window"``.
        """
        q_means, k_means = (self._means(x, layout, side, order) for side, x in enumerate((q, k)))
        group = q.shape[2] // k.shape[2]
        return Means(q_means, k_means if group == 1 else namespace(k).repeat(k_means, group, axis=2))

    def _means(self, x: Array, layout: TokenLayout, side: int, order: str) -> Array:
        xp = namespace(x)
        length, device = x.shape[1], device_of(x)
        key = (xp.__name__, str(device), layout, length, side, order)
        index = self._indices.find(key)
        if index is None:
            places = xp.asarray(sampled_tokens(layout, length, side, order), device=device)
            index = self._indices.keep(key, places)
        batch, _, heads, dim = x.shape
        tokens = xp.reshape(xp.take(x, xp.reshape(index, (-1,)), axis=1), (batch, *index.shape, heads, dim))
        means = xp.sum(tokens, axis=2, dtype=compute_dtype(x, xp)) / index.shape[1]
        return xp.astype(means, x.dtype, copy=False)


def sampled_tokens(layout: TokenLayout, length: int, side: int, order: str) -> np.ndarray:
    """Where the tokens of the sampled blocks stand in the sequence, int64 ``[blocks, tokens a block]``.

    Args:
        side: 0 for queries, 1 for keys.
        order: as in `Sampler.means`.
    """
    axis = layout.axis(length, side)
    whole = min(axis.free_blocks, length // axis.block)
    step = max(1, min(_EVERY, whole // _FEWEST))
    groups = np.arange(max(1, whole // step))  # without an unprotected block: the first block
    # A place in its group that differs from one to the next, or rows of 8 windows would give one column of the picture.
    blocks = groups * step + (groups * _GOLDEN % 1 * step).astype(np.int64)
    places: np.ndarray = blocks[:, None] * axis.block + np.arange(min(axis.block, length))
    return layout.order[places] if axis.ordered and order == "window" and layout.order is not None else places


def drift(means: Means, reference: Means) -> Array:
    """The drift of every head, the largest of the batch: float32 (float64 for float64) ``[heads]``.

    Of a reference that is 0 the drift is 0 or very large; NaN where a mean is NaN.
    """
    xp = namespace(means.q)
    return xp.max(_moved(means.q, reference.q, xp) + _moved(means.k, reference.k, xp), axis=0)


def _moved(new: Array, old: Array, xp: Any) -> Array:
    """Relative change, ``[batch, heads]``."""
    dtype = compute_dtype(new, xp)
    old = xp.astype(old, dtype, copy=False)
    # Not by clip, which waits for the device in older versions of array-api-compat.
    return _norm(xp.astype(new, dtype, copy=False) - old, xp) / (_norm(old, xp) + _TINY)


def _norm(x: Array, xp: Any) -> Array:
    return xp.sqrt(xp.sum(x * x, axis=(1, 3)))
