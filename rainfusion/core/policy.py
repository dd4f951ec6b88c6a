"""Policies: how many key blocks a query block keeps, and by which rule.

A policy is static (frozen, hashable, JSON); the selection itself is `semantics.select`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rainfusion.core.checks import as_share, one_of
from rainfusion.core.errors import PolicyError
from rainfusion.core.layout import BlockedAxis

COUNTINGS = ("realised", "paper")


@dataclass(frozen=True)
class TopK:
    """Keep exactly k key blocks for each query block, the ones with the highest scores.

    Args:
        sparsity: share of block pairs to skip, in [0, 1).
        counting: ``"realised"`` makes `sparsity` the share that is really skipped, protected blocks
            counted in (the default). ``"paper"`` keeps ``ceil((1 - sparsity) * unprotected key blocks)``
            in every row and the protected blocks on top, as the code published with RainFusion2.0
            does: at 21x45x80 a nominal 80 % then skips 72.2 %.

    Raises:
        PolicyError: sparsity outside [0, 1), an unknown counting.
    """

    sparsity: float = 0.8
    counting: str = "realised"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", as_share(self.sparsity, "sparsity", PolicyError, top=False))
        one_of(self.counting, COUNTINGS, "counting", PolicyError)

    def row_quotas(self, q: BlockedAxis, kv: BlockedAxis) -> np.ndarray:
        """Unprotected key blocks to keep in each unprotected query row, int64 ``[q.free_blocks]``.

        Where protection (or the one block every row keeps) alone exceeds the budget, the quotas are the
        least that keep it, and the planner warns.
        """
        return spread(self.kept_pairs(q, kv), q.free_blocks)

    def kept_pairs(self, q: BlockedAxis, kv: BlockedAxis) -> int:
        """Unprotected block pairs to keep, the sum of `row_quotas`."""
        free_pairs = q.free_blocks * kv.free_blocks
        if self.counting == "paper":
            wanted = math.ceil((1 - self.sparsity) * kv.free_blocks) * q.free_blocks
        else:
            wanted = self.budget(q.blocks * kv.blocks) - (q.blocks * kv.blocks - free_pairs)
        least = q.free_blocks if kv.free_blocks == kv.blocks else 0
        return min(max(wanted, least), free_pairs)

    def budget(self, pairs: int) -> int:
        """Block pairs to keep of `pairs`, protected ones counted in: the nearest whole number, ties to the larger."""
        return math.floor((1 - self.sparsity) * pairs + 0.5)

    def __str__(self) -> str:
        counting = "" if self.counting == "realised" else f", counting={self.counting}"
        return f"topk(sparsity={self.sparsity:g}{counting})"


@dataclass(frozen=True)
class TopP:
    """Keep, for each query block, the smallest set of key blocks that reaches a share of the mass.

    The mass of a key block is its softmax weight among all blocks of the row, each weighted by its
    token count; protected blocks are in the set from the start.

    Args:
        mass: share of the mass to reach, in [0, 1]; 1 keeps every block.
        floor: least share of the row's key blocks to keep, in [0, 1].

    Raises:
        PolicyError: a value outside its range.
    """

    mass: float = 0.9
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mass", "floor"):
            object.__setattr__(self, name, as_share(getattr(self, name), name, PolicyError, top=True))

    def least(self, kv: BlockedAxis) -> int:
        """Unprotected key blocks every row keeps, whatever their mass: the floor, and one block a row (Law 4)."""
        needed = math.ceil(self.floor * kv.blocks) - (kv.blocks - kv.free_blocks)
        return max(needed, 1 if kv.free_blocks == kv.blocks else 0)

    def __str__(self) -> str:
        return f"topp(mass={self.mass:g}, floor={self.floor:g})"


@dataclass(frozen=True)
class Fixed:
    """Use a mask given at call time: one made elsewhere, or one kept from an earlier step."""

    def __str__(self) -> str:
        return "fixed"


Policy = TopK | TopP | Fixed
POLICIES: dict[str, type[TopK] | type[TopP] | type[Fixed]] = {"topk": TopK, "topp": TopP, "fixed": Fixed}


def spread(total: int, rows: int) -> np.ndarray:
    """Share `total` over `rows` as evenly as whole numbers allow, the larger shares spaced evenly."""
    edges = np.arange(rows + 1) * total // max(rows, 1)
    return np.diff(edges)
