"""The rules that are compared: how a call's blocks are chosen, how many, and what becomes of the others.

Most are settings of `rainfusion.attention`. Those that rainfusion does not ship are written here the way a user would
write them: a policy of one's own, or a mask of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rainfusion
from rainfusion.core.layout import BlockedAxis, TokenLayout
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import select
from rainfusion.core.parts import Grid
from rainfusion.core.policies import Policy, TopK

Sizes = tuple[int, int, int]
Scores = Callable[[Tensor, Tensor, TokenLayout, float], Tensor]


@dataclass(frozen=True)
class Rule:
    """How a self-attention call is made sparse.

    Attributes:
        name: of the rule in tables.
        policy: from a share of block pairs to skip, the policy.
        settings: further arguments of `rainfusion.attention`.
        scores: block scores of one's own, ``[B, H, blocks, blocks]`` from q and k ``[B, H, S, D]`` in block order.
        raster: blocks follow the raster order of the tokens.
    """

    name: str
    policy: Callable[[float], Policy] = TopK
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: Scores | None = None
    raster: bool = False

    def attention(self, q: Tensor, k: Tensor, v: Tensor, grid: Sizes, share: float) -> tuple[Tensor, BlockMask]:
        """The attention ``[B, S, H, D]``, and the mask that was used."""
        settings = {"block": 128, "parts": (self._part(grid),), "tensor_layout": "bshd", **self._of_calls}
        if self.scores is None:
            settings["policy"] = self.policy(share)
        else:
            settings["mask"] = self._mask(q, k, share, settings)
        out, mask = rainfusion.attention(q, k, v, return_mask=True, **settings)
        return out, mask

    @property
    def _of_calls(self) -> dict[str, Any]:
        """The settings without those of the grid."""
        return {name: value for name, value in self.settings.items() if name not in ("sink", "window")}

    def layout(self, grid: Sizes) -> TokenLayout:
        """The order and blocks of the tokens of a grid."""
        return TokenLayout(parts=(self._part(grid),), block=self.settings.get("block", 128))

    def _part(self, grid: Sizes) -> Grid:
        part = Grid(*grid, sink=self.settings.get("sink", "first_frame"), window=self.settings.get("window"))
        return replace(part, window=_row(part, self.settings.get("block", 128))) if self.raster else part

    def _mask(self, q: Tensor, k: Tensor, share: float, settings: dict[str, Any]) -> BlockMask:
        layout = TokenLayout(parts=settings["parts"], block=settings["block"])
        rows, columns = layout.axis(q.shape[1], 0), layout.axis(k.shape[1], 1)
        order = torch.tensor(layout.order, device=q.device)
        q, k = (x.index_select(1, order).transpose(1, 2).float() for x in (q, k))
        score = self.scores(q, k, layout, q.shape[-1] ** -0.5)
        quotas = torch.as_tensor(self.policy(share).budget(rows, columns, q.shape[1]).quotas, device=q.device)
        blocks = select(score, quotas, q=rows, kv=columns)
        return BlockMask.from_bool(blocks, rows.length, columns.length, layout.block, layout)


def _row(part: Grid, block: int) -> Sizes:
    """A window that folds nothing: one token high, and wider than the grid."""
    return (1, 1, block * (part.width // block + 1))


# -- policies of one's own -----------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnBlock(TopK):
    """The best k, a query block's own key block before all others."""

    def prior(self, q: BlockedAxis, kv: BlockedAxis) -> np.ndarray:
        return np.where(np.eye(q.blocks, kv.blocks, dtype=bool), np.inf, 0.0).astype(np.float32)


@dataclass(frozen=True)
class Nearest(TopK):
    """The best k, the `count` blocks whose tokens are nearest before all others."""

    grid: Sizes = (1, 1, 1)
    sink: str | None = None
    count: int = 9

    def prior(self, q: BlockedAxis, kv: BlockedAxis) -> np.ndarray:
        far = distances(TokenLayout(parts=(Grid(*self.grid, sink=self.sink),), block=q.block))
        rank = far.argsort(axis=-1, kind="stable").argsort(axis=-1, kind="stable")
        return np.where(rank < self.count, np.inf, 0.0).astype(np.float32)


@dataclass(frozen=True)
class RandomBlocks(TopK):
    """k blocks drawn at random, the same in every call."""

    seed: int = 0

    def prior(self, q: BlockedAxis, kv: BlockedAxis) -> np.ndarray:
        return (1e6 * np.random.default_rng(self.seed).random((q.blocks, kv.blocks))).astype(np.float32)


def distances(layout: TokenLayout) -> np.ndarray:
    """Between the middles of blocks, in windows, ``[blocks, blocks]``."""
    grid = layout.grids[0]
    places = np.stack(np.unravel_index(np.asarray(layout.order), grid.sizes), axis=-1) / np.asarray(grid.window)
    block = layout.block[0]
    middles = np.stack([places[start : start + block].mean(axis=0) for start in range(0, len(places), block)])
    return np.square(middles[:, None] - middles[None]).sum(axis=-1)


# -- scores of one's own -------------------------------------------------------------------------------


def sub_blocks(q: Tensor, k: Tensor, layout: TokenLayout, scale: float, pieces: int = 4) -> Tensor:
    """Log of the mean exponential over the pairs of a block pair's pieces, by their means (sglang's SubBlock)."""
    logits = _pieces(q, layout.block[0], pieces) @ _pieces(k, layout.block[1], pieces).mT * scale
    batch, heads, rows, columns = logits.shape
    logits = logits.reshape(batch, heads, rows // pieces, pieces, columns // pieces, pieces)
    return logits.logsumexp(dim=(3, 5)) - 2 * np.log(pieces)


def compensation_error(q: Tensor, k: Tensor, layout: TokenLayout, scale: float) -> Tensor:
    """Log of what a summary of the key block leaves out of its weight, estimated by pieces of both blocks."""
    exact = sub_blocks(q, k, layout, scale)
    summarised = sub_blocks(q, k, layout, scale, pieces=1)
    return exact + torch.log1p(-torch.exp((summarised - exact).clamp(max=-1e-6)))


def _pieces(x: Tensor, block: int, pieces: int) -> Tensor:
    """Means of the pieces of blocks ``[B, H, blocks * pieces, D]``; a piece without tokens has its block's."""
    size = block // pieces
    missing = -x.shape[2] % block
    counts = torch.nn.functional.pad(torch.ones_like(x[..., :1]), (0, 0, 0, missing)).unflatten(2, (-1, size)).sum(3)
    sums = torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, size)).sum(3)
    whole = (sums.unflatten(2, (-1, pieces)).sum(3) / counts.unflatten(2, (-1, pieces)).sum(3)).repeat_interleave(
        pieces, dim=2
    )
    return torch.where(counts > 0, sums / counts.clamp(min=1), whole)
