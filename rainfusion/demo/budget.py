"""What a plan keeps, in words and in bounds, for the command line and for pictures."""

from __future__ import annotations

import numpy as np

from rainfusion.core.ops import Select
from rainfusion.core.plan import Plan


def kept_words(plan: Plan) -> str:
    """What every unprotected query block keeps, such as ``65 or 66 of 562 unprotected key blocks``."""
    if plan.is_dense:
        return "every key block"
    chosen = plan.find(Select)
    if chosen is None:
        return "what a mask says that is given at call time"
    quotas, free = plan.constant(chosen.quotas), chosen.kv.free_blocks
    if quotas is None:
        least = "as many unprotected key blocks as quotas say that are given at call time"
    elif chosen.over == "all":
        least = f"the best {_span(quotas)} of all {chosen.kv.blocks} key blocks, and the protected ones"
    else:
        least = f"{_span(quotas)} of {free} unprotected key blocks"
    if chosen.mass is None:
        return least
    return f"the fewest key blocks that hold {chosen.mass:.0%} of the mass{_at_least(quotas, least)}"


def density_bounds(plan: Plan) -> tuple[float, float] | None:
    """The least and the greatest share of block pairs that the plan may attend to; None where a call decides all."""
    if plan.density is not None:
        return plan.density, plan.density
    chosen = plan.find(Select)
    quotas = None if chosen is None else plan.constant(chosen.quotas)
    if chosen is None or quotas is None:
        return None
    q, kv = chosen.q, chosen.kv
    protected = kv.blocks - kv.free_blocks
    on_top = np.minimum(quotas + protected, kv.blocks)
    least = np.maximum(quotas, protected) if chosen.over == "all" else on_top
    most = on_top if chosen.mass is None else np.full_like(quotas, kv.blocks)
    dense_rows = (q.blocks - q.free_blocks) / q.blocks
    low, high = (
        float(counts.mean()) / kv.blocks * (1 - dense_rows) + dense_rows if counts.size else 1.0
        for counts in (least, most)
    )
    return low, high


def _at_least(quotas: np.ndarray | None, words: str) -> str:
    return "" if quotas is not None and not quotas.any() else f", at least {words}"


def _span(quotas: np.ndarray) -> str:
    """Quotas as a number, two next to each other, or a range."""
    if quotas.size == 0:
        return "none"
    low, high = int(quotas.min()), int(quotas.max())
    if low == high:
        return str(low)
    return f"{low} or {high}" if high == low + 1 else f"{low} to {high}"
