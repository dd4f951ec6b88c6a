"""What a kernel needs to know when a plan is lowered."""

from __future__ import annotations

import numpy as np

from rainfusion.core.errors import LoweringError
from rainfusion.core.plan import Plan


def require(holds: bool, reason: str) -> None:
    """Decline a segment, with the reason, where something does not hold.

    Raises:
        LoweringError: it does not.
    """
    if not holds:
        raise LoweringError(reason)


def constant_order(plan: Plan, name: str | None, inverse: str | None = None) -> np.ndarray | None:
    """The order of that name; None where tokens are read as they stand.

    Raises:
        LoweringError: it is known only at call time, or `inverse` does not lead back.
    """
    if name is None:
        return None
    order = plan.constant(name)
    require(order is not None, f"{name} is known only at call time")
    assert order is not None
    if inverse is not None:
        back = plan.constant(inverse)
        require(
            back is not None and np.array_equal(order[back], np.arange(len(order))), f"{inverse} is not its inverse"
        )
    return order
