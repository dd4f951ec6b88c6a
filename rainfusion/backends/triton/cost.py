"""How a plan's time compares with dense attention, on chips where both were measured.

Short sequences are where skipping cannot pay: a few launches and one pass over q, k and v come first, and dense
attention is done before they are. The estimate is meant to tell that, not to predict a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass

from rainfusion.backends.triton.attend import takes_hopper
from rainfusion.core.ops import Attend, AttendQuantised
from rainfusion.core.plan import Plan

_BYTES = 2  # a channel in half precision, the only one with figures


@dataclass(frozen=True)
class Rates:
    """What was measured on a chip.

    Attributes:
        dense, sparse: operations a second of torch's dense attention and of ours, on the pairs it attends.
        bandwidth: bytes a second while tokens are folded into blocks.
        dense_call, sparse_call: seconds a call takes at least, for Python and launches.
    """

    dense: float
    sparse: float
    bandwidth: float
    dense_call: float
    sparse_call: float


# By architecture and head dim, from `benchmarks/cuda_attention.py` on an H100. What a call takes at least is its seven
# launches; it was read off stages that the device finishes sooner than that.
MEASURED: dict[tuple[str, int], Rates] = {("sm_90", 128): Rates(560e12, 600e12, 2.4e12, 30e-6, 500e-6)}

# Attention in 8 bits beside that in 16, and its passes over q, k and v: on an H200, 40 heads of 75,600 tokens.
_ATTENDS_FASTER, _FOLDS_SLOWER = 1.4, 1.8


def speedup(plan: Plan, architecture: str) -> float | None:
    """How many times faster than dense attention the plan is estimated to be; None where that was not measured."""
    problem, attend = plan.problem, plan.find(Attend)
    rates = MEASURED.get((architecture, problem.head_dim))
    if rates is None or plan.flops is None or attend is None:
        return None
    wide = plan.summarises and "%lse" in plan.returns
    if not takes_hopper(attend, plan, architecture, has_wide_means=wide):
        return None
    dense = max(problem.dense_flops / rates.dense, rates.dense_call)
    if plan.is_dense:
        return 1.0
    attended, folded = plan.flops / rates.sparse, _folded_bytes(plan, attend) / rates.bandwidth
    if isinstance(attend, AttendQuantised):
        attended, folded = attended / _ATTENDS_FASTER, folded * _FOLDS_SLOWER
    return dense / max(attended + folded, rates.sparse_call)


def _folded_bytes(plan: Plan, attend: Attend) -> int:
    """Bytes read for the means, and read and written where tokens are put into block order."""
    problem = plan.problem
    q = problem.batch * problem.heads * problem.q_len * problem.head_dim * _BYTES
    kv = problem.batch * problem.kv_heads * problem.kv_len * problem.head_dim * _BYTES
    if attend.order is None:
        return q + kv * (2 if plan.summarises else 1)
    return 2 * (q + 2 * kv)
