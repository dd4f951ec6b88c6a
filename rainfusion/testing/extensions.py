"""What third parties may add to plans, as the kit's cases use it: a policy with a prior, and an operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace

from rainfusion.core.layout import BlockedAxis
from rainfusion.core.ops import Op, Select, ValueType, operand, result
from rainfusion.core.plan import Plan
from rainfusion.core.policies import Budget, Policy, TopK


@dataclass(frozen=True)
class NearBlocks(Policy):
    """As `TopK`, the block on the diagonal first, and the ones beside it preferred."""

    sparsity: float = 0.5

    def budget(self, q: BlockedAxis, kv: BlockedAxis, heads: int) -> Budget:
        """That of `TopK`."""
        return TopK(self.sparsity).budget(q, kv, heads)

    def prior(self, q: BlockedAxis, kv: BlockedAxis) -> np.ndarray:
        """Infinite on the diagonal, 0.25 beside it."""
        distance = np.abs(np.arange(q.blocks)[:, None] - np.arange(kv.blocks))
        return np.where(distance == 0, np.inf, np.where(distance == 1, 0.25, 0.0)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class ScaleScore(Op):
    """Scores, those of odd key blocks multiplied by a factor."""

    name: ClassVar[str] = "rainfusion.testing.scale_score"
    score: str = operand()
    scaled: str = result()
    factor: float

    def meaning(self, score: Any) -> Any:
        """The definition."""
        xp = array_namespace(score)
        odd = xp.arange(score.shape[-1], device=score.device) % 2 == 1
        return xp.where(odd, score * self.factor, score)

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        """The type of the scores."""
        return {"scaled": types["score"]}


def scale_scores(plan: Plan) -> Plan:
    """A pass: blocks are selected by scaled scores; a plan that selects none stays as it is."""
    ops: list[Op] = []
    for op in plan.ops:
        if isinstance(op, Select):
            ops.append(ScaleScore(score=op.score, scaled="%scaled_score", factor=-0.5))
            op = replace(op, score="%scaled_score")
        ops.append(op)
    return replace(plan, ops=tuple(ops))
