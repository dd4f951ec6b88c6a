"""What third parties may add to plans, as the kit's cases use it: a policy with a prior, and an operation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace

from rainfusion.core.layout import BlockedAxis
from rainfusion.core.ops import Op, Select, operand, result
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
        return np.select([distance == 0, distance == 1], [np.inf, 0.25]).astype(np.float32)


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
        return xp.where(xp.arange(score.shape[-1], device=score.device) % 2 == 1, score * self.factor, score)


def scale_scores(plan: Plan) -> Plan:
    """A pass: blocks are selected by scaled scores; a plan that selects none stays as it is."""
    chosen = plan.find(Select)
    if chosen is None:
        return plan
    at = plan.ops.index(chosen)
    scale = ScaleScore(score=chosen.score, scaled="%scaled_score", factor=-0.5)
    return replace(plan, ops=(*plan.ops[:at], scale, replace(chosen, score=scale.scaled), *plan.ops[at + 1 :]))
