"""Policies: how many key blocks each query block keeps, and what is added to or used as their scores.

A policy turns the static facts of a call into a `Budget`, and where it wants into a prior on the scores or a score of
its own. The planner writes these into the plan; backends see budgets and scores, never a policy. A policy of one's
own is a frozen dataclass that subclasses `Policy`; nothing else needs to know it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from rainfusion.core.checks import as_instance, as_int, as_share, one_of, shown
from rainfusion.core.errors import PolicyError
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.ops import BlockScore, Op

_MOST_HEADS = 2**16  # beyond it a tuple of shares is a mistake, and would take seconds to look through
COUNTINGS = ("realised", "paper")


@dataclass(frozen=True, eq=False)
class Budget:
    """What a query block may keep.

    Args:
        quotas: int ``[heads or 1, unprotected q blocks]``, the unprotected key blocks that each row keeps at least,
            best first.
        mass: and as many more as reach this share of the row's softmax mass over blocks, in [0, 1]; None for none.
        over: ``"free"``, or ``"all"``: the quotas' best blocks are taken from all columns, protection comes on top.
    """

    quotas: np.ndarray
    mass: float | None = None
    over: str = "free"


@dataclass(frozen=True)
class Policy(ABC):
    """Base class of policies: frozen dataclasses whose fields are numbers, text, or tuples of them.

    A subclass is known by `name`, by default its module and class name; a plan's compiled graph finds it by that.
    """

    name: ClassVar[str] = ""
    reads_mask: ClassVar[bool] = False
    """Whether blocks are chosen by a mask that is given at call time."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = f"{cls.__module__}.{cls.__qualname__}"
        _POLICIES[cls.name] = cls

    @abstractmethod
    def budget(self, q: BlockedAxis, kv: BlockedAxis, heads: int) -> Budget | None:
        """The budget of a call, or None where the mask is given at call time.

        Args:
            q, kv: how either side is cut into blocks; ``free_blocks`` of them are unprotected and come first.
            heads: query heads.

        Raises:
            PolicyError: sides that are none of `TokenLayout.axis`, or no number of heads; as the policy's class says.
        """

    def prior(self, q: BlockedAxis, kv: BlockedAxis) -> np.ndarray | None:
        """Added to the scores before blocks are chosen: ``[q blocks, key blocks]`` or ``[heads, ...]``; None for none.

        Plus infinity makes a block the first to be chosen, minus infinity the last.
        """
        return None

    def score(self, qb: str, kb: str, prior: str | None, *, score: str, scale: float) -> Op:
        """The operation that scores blocks by their means: reads the values `qb`, `kb` and `prior`, makes `score`."""
        return BlockScore(qb=qb, kb=kb, prior=prior, score=score, scale=scale)

    def unreached(self, q: BlockedAxis, kv: BlockedAxis, skipped: float) -> str:
        """Why the share of block pairs that is skipped is not what was asked for; empty where it is."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain JSON values; `from_dict` reads it back."""
        return {"name": self.name, **asdict(self)}

    def __str__(self) -> str:
        values = [(f, getattr(self, f.name)) for f in fields(self)]
        said = [f"{f.name}={_described(value)}" for f, value in values if f.name in _ALWAYS_SAID or value != f.default]
        return f"{self.name.rpartition('.')[2].lower()}({', '.join(said)})"


_ALWAYS_SAID = ("sparsity", "mass")  # also where they are the default

_POLICIES: dict[str, type[Policy]] = {}


def from_dict(record: Mapping[str, Any]) -> Policy:
    """The policy that `Policy.to_dict` wrote.

    Raises:
        PolicyError: an unknown policy, or values that it does not take.
    """
    values = dict(record)
    name = values.pop("name", None)
    if name not in _POLICIES:
        raise PolicyError(f"policy {shown(name)} is not known here; import the module that defines it")
    try:
        return _POLICIES[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise PolicyError(f"policy {name} does not take {shown(values)}: {error}") from None


@dataclass(frozen=True)
class TopK(Policy):
    """Keep exactly k key blocks for each query block, the ones with the highest scores.

    Args:
        sparsity: share of block pairs to skip, in [0, 1); a tuple gives one share a head.
        counting: ``"realised"`` makes `sparsity` the share that is really skipped, protected blocks counted in (the
            default). ``"paper"`` keeps ``ceil((1 - sparsity) * key blocks)`` of all columns in every row and adds the
            protected blocks on top, as the code published with RainFusion2.0 does.

    Raises:
        PolicyError: sparsity outside [0, 1), an unknown counting; when planned, another number of shares than heads.
    """

    name: ClassVar[str] = "topk"
    sparsity: float | tuple[float, ...] = 0.8
    counting: str = "realised"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _shares(self.sparsity))
        one_of(self.counting, COUNTINGS, "counting", PolicyError)

    def budget(self, q: BlockedAxis, kv: BlockedAxis, heads: int) -> Budget:
        _check_call(q, kv, heads)
        shares = _per_head(self.sparsity, heads)
        if self.counting == "paper":
            quotas = [np.full(q.free_blocks, math.ceil((1 - share) * kv.blocks)) for share in shares]
            return Budget(np.stack(quotas), over="all")
        return Budget(np.stack([spread(kept_pairs(share, q, kv), q.free_blocks) for share in shares]))

    def unreached(self, q: BlockedAxis, kv: BlockedAxis, skipped: float) -> str:
        _check_call(q, kv)
        if self.counting == "paper":
            return ""
        pairs = q.blocks * kv.blocks
        shares = self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)
        asked = sum(pairs - nearest((1 - share) * pairs) for share in shares) / len(shares) / pairs
        return f"sparsity={_described(self.sparsity)} cannot be reached" if skipped < asked - 1e-12 else ""


@dataclass(frozen=True)
class TopP(Policy):
    """Keep, for each query block, the smallest set of key blocks that reaches a share of the mass.

    The mass of a key block is its softmax weight among all blocks of the row, each weighted by its token count;
    protected blocks are in the set from the start. As SpargeAttn's and Jenga's rules; over block means it is ours.

    Args:
        mass: share of the mass to reach, in [0, 1]; 1 keeps every block.
        floor: least share of the row's key blocks to keep, in [0, 1].

    Raises:
        PolicyError: a value outside its range.
    """

    name: ClassVar[str] = "topp"
    mass: float = 0.9
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mass", "floor"):
            object.__setattr__(self, name, as_share(getattr(self, name), name, PolicyError, top=True))

    def budget(self, q: BlockedAxis, kv: BlockedAxis, heads: int) -> Budget:
        _check_call(q, kv, heads)
        least = max(math.ceil(self.floor * kv.blocks) - (kv.blocks - kv.free_blocks), fewest(kv))
        quotas = kv.free_blocks if self.mass == 1 else min(least, kv.free_blocks)
        return Budget(np.full((1, q.free_blocks), quotas), self.mass)


@dataclass(frozen=True)
class Hybrid(Policy):
    """Keep the union of what `TopK` keeps and what `TopP` keeps: k blocks, and more where the mass asks for them.

    Args:
        sparsity: as for `TopK`, the most that is skipped; mass: as for `TopP`.

    Raises:
        PolicyError: a value outside its range; when planned, another number of shares than heads.
    """

    name: ClassVar[str] = "hybrid"
    sparsity: float | tuple[float, ...] = 0.9
    mass: float = 0.8

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _shares(self.sparsity))
        object.__setattr__(self, "mass", as_share(self.mass, "mass", PolicyError, top=True))

    def budget(self, q: BlockedAxis, kv: BlockedAxis, heads: int) -> Budget:
        _check_call(q, kv, heads)
        if self.mass == 1:
            return Budget(np.full((1, q.free_blocks), kv.free_blocks), self.mass)
        return Budget(TopK(self.sparsity).budget(q, kv, heads).quotas, self.mass)


@dataclass(frozen=True)
class Fixed(Policy):
    """Use a mask given at call time: one made elsewhere, or one kept from an earlier step."""

    name: ClassVar[str] = "fixed"
    reads_mask: ClassVar[bool] = True

    def budget(self, q: BlockedAxis, kv: BlockedAxis, heads: int) -> None:
        return None

    def __str__(self) -> str:
        return "fixed"


def kept_pairs(sparsity: float, q: BlockedAxis, kv: BlockedAxis) -> int:
    """Unprotected block pairs to keep so that `sparsity` is skipped of all pairs, protected ones counted in.

    Where protection (or the one block that every row keeps) alone exceeds the budget, the least that keeps it.
    """
    free_pairs = q.free_blocks * kv.free_blocks
    pairs = q.blocks * kv.blocks
    wanted = nearest((1 - sparsity) * pairs) - (pairs - free_pairs)
    return min(max(wanted, q.free_blocks * fewest(kv)), free_pairs)


def fewest(kv: BlockedAxis) -> int:
    """Unprotected key blocks that every row keeps at least (Law 4): one, unless it has protected ones."""
    return 1 if kv.free_blocks == kv.blocks else 0


def nearest(number: float) -> int:
    """The nearest whole number, ties to the larger."""
    return math.floor(number + 0.5)


def spread(total: int, rows: int) -> np.ndarray:
    """Share `total` over `rows` as evenly as whole numbers allow, the larger shares spaced evenly: int64 ``[rows]``."""
    edges = np.arange(rows + 1) * total // max(rows, 1)
    return np.diff(edges)


def _check_call(q: Any, kv: Any, heads: Any = 1) -> None:
    for name, side in (("q", q), ("kv", kv)):
        as_instance(side, BlockedAxis, name, PolicyError, "TokenLayout.axis")
    as_int(heads, "heads", PolicyError)


def _shares(sparsity: Any) -> float | tuple[float, ...]:
    if isinstance(sparsity, tuple | list):
        if not sparsity:
            raise PolicyError("sparsity=() names no head; give one share, or one a head")
        if len(sparsity) > _MOST_HEADS:
            raise PolicyError(f"sparsity has {len(sparsity)} shares; give one share, or one a head")
        return tuple(as_share(share, "sparsity", PolicyError, top=False) for share in sparsity)
    return as_share(sparsity, "sparsity", PolicyError, top=False)


def _per_head(sparsity: float | tuple[float, ...], heads: int) -> tuple[float, ...]:
    if not isinstance(sparsity, tuple):
        return (sparsity,)
    if len(sparsity) != heads:
        raise PolicyError(f"sparsity has {len(sparsity)} shares for {heads} heads; give one share, or one a head")
    return sparsity


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{min(value):g}..{max(value):g} a head"
    return f"{value:g}" if isinstance(value, float) else str(value)
