"""Observing: a case run on a backend, in whole or in part, and measured against the oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import rainfusion
from rainfusion.core.layout import Text
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import Select
from rainfusion.core.plan import Plan
from rainfusion.testing.cases import Case
from rainfusion.testing.numbers import digest, largest, pattern, sketch, typical_error, worst_error
from rainfusion.testing.observation import Observation
from rainfusion.testing.oracle import expected, expected_mask
from rainfusion.testing.target import Results, Target


def observe(target: Target, case: Case, level: str) -> Observation:
    """Run a case on a backend and measure what it did."""
    asked = Observation(level, case.name, case.problem.dtype, case.seed)
    if objections := target.objections(case):
        return replace(asked, refused=f"{target} does not claim it: {objections}")
    return LEVELS[level](target, case, replace(asked, inputs=case.fingerprint()))


def _attend(target: Target, case: Case, asked: Observation) -> Observation:
    """Attention under the case's mask, by the kernel that runs where the case's values are returned."""
    mask = None if case.plan().is_dense else case.mask()
    seen = with_output(asked, case, mask, target.under(case, mask, lse="%lse" in case.returns))
    return seen if mask is None else replace(seen, mask=mask.blocks)


def _select(target: Target, case: Case, asked: Observation) -> Observation:
    return with_choice(asked, case, target.selected(case).blocks)


def _attention(target: Target, case: Case, asked: Observation) -> Observation:
    """`rainfusion.attention` as users call it: the mask it chose, and output and log-sum-exp under that mask."""
    plan = case.plan(returns=("%out", "%lse", "%mask") if target.capabilities.lse else ("%out", "%mask"))
    with warnings.catch_warnings():  # small cases are neither fast nor well spent
        warnings.simplefilter("ignore", rainfusion.RainfusionWarning)
        got = target.results(plan, _call(target, case, plan))
    if case.selects:
        asked = with_choice(asked, case, got["%mask"])
    elif plan.takes("%mask"):
        asked = replace(asked, mask=case.mask().blocks, selected=got["%mask"])
    mask = None if plan.is_dense else case.block_mask(got["%mask"])
    return replace(with_output(asked, case, mask, got), out=None, oracle=None)  # under a mask of its own: not compared


def _call(target: Target, case: Case, plan: Plan) -> Any:
    tensors, problem, layout = target.tensors(case), case.problem, case.layout
    settings: dict[str, Any] = dict(case.operands(plan))
    settings["mask"] = target.mask(case.mask()) if plan.takes("%mask") else None
    if case.change is not None:  # no argument of the call changes the plan
        return rainfusion.lower(plan, device=str(target.device), backend=target.backend.name)(*tensors, **settings)
    words = [isinstance(part, Text) for part in layout.parts]
    if layout.grid is not None and len(words) - sum(words) == 1 and sum(words) < 2:
        settings |= {"grid": layout.grid, "text": layout.text, "text_position": "start" if words[0] else "end"}
        settings |= {"window": layout.window, "sink": layout.grids[0].sink}
    else:
        settings["parts"] = layout.parts or None
    return rainfusion.attention(
        *tensors,
        **settings,
        policy=None if plan.takes("%mask") else case.policy,
        block=layout.block,
        omitted=case.omitted,
        order=case.order,
        tensor_layout=problem.tensor_layout,
        scale=problem.scale,
        precision=case.precision,
        rotate=case.rotate,
        return_lse="%lse" in plan.returns,
        return_mask=True,
        backend=target.backend.name,
    )


LEVELS: dict[str, Callable[[Target, Case, Observation], Observation]] = {
    "attend": _attend,
    "select": _select,
    "attention": _attention,
}


def with_output(seen: Observation, case: Case, mask: BlockMask | None, got: Results) -> Observation:
    """What was observed, with an output, and log-sum-exp if there is one, that was computed under `mask`."""
    right, out = expected(case, mask), got["%out"]
    if "%lse" in got:
        seen = replace(seen, lse_error=worst_error(got["%lse"], right.lse), lse_allowed=right.lse_limit)
    if right.typical_limit is not None and not (typical := typical_error(out, right.out)) <= right.typical_limit:
        said = f"the output is typically off by {typical:.3g} (at most {right.typical_limit:.3g})"
        seen = replace(seen, problems=(*seen.problems, said))
    return replace(
        seen,
        error=worst_error(out, right.out),
        allowed=right.out_limit,
        largest=largest(right.out),
        elements=out.size,
        bits=digest(out),
        pattern=pattern(out),
        out=sketch(out),
        oracle=sketch(right.out),
    )


def with_choice(seen: Observation, case: Case, blocks: np.ndarray) -> Observation:
    """What was observed, with a mask that the backend selected."""
    right, chosen = expected_mask(case), case.plan().find(Select)
    seen = replace(seen, mask=right.blocks, selected=blocks, undecided=right.undecided)
    counts, planned = blocks.sum(axis=-1), right.blocks.sum(axis=-1)
    problems = []
    if chosen is not None and chosen.mass is None and chosen.over == "free" and (counts != planned).any():
        problems.append(f"rows keep {_span(counts)} blocks where {_span(planned)} are planned, row by row")
    if ((counts == 0) & (planned > 0)).any():
        problems.append("a row keeps no block")
    return replace(seen, problems=(*seen.problems, *problems))


def _span(counts: Any) -> str:
    return f"{int(counts.min())} to {int(counts.max())}"
