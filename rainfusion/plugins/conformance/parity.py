"""Two backends on the same cases: do two pieces of hardware give the same answer?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rainfusion.core.mask import BlockMask
from rainfusion.plugins.conformance.cases import Case
from rainfusion.plugins.conformance.measure import agreement, relative_error, worst_error
from rainfusion.plugins.conformance.oracle import Expected, expected, expected_mask
from rainfusion.plugins.conformance.target import Outcome, Target, find_target


@dataclass(frozen=True)
class CaseComparison:
    """How far two backends are apart on one case.

    Attributes:
        case: its name.
        ok: whether they agree within the tolerance; None where the case was not compared.
        absolute, relative: worst difference of the outputs, both computed under the oracle's mask (the given one
            where a mask is given); relative to the largest value.
        lse: worst difference of the log-sum-exp; None where one of them does not claim it.
        mask_agreement: share of block pairs on which the masks they select agree; None where none is
            selected. Near ties may differ, see `tolerance`.
        tolerance: largest allowed `absolute`: what either may be away from the float64 oracle, added up.
        refused: why the case was not compared: which backend does not claim which capability.
        answer: what the first backend computed, and what it is measured by.
    """

    case: str
    ok: bool | None = None
    absolute: float = 0.0
    relative: float = 0.0
    lse: float | None = None
    mask_agreement: float | None = None
    tolerance: float = 0.0
    refused: str = ""
    answer: Answer | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Question:
    """A case and its right answer.

    Attributes:
        mask: the mask under which outputs are computed, the oracle's choice where the case selects; None if dense.
        right: output and log-sum-exp under it, and how far a backend may be from them.
        undecided: pairs on which a mask that is selected may differ from `mask`; None where none is selected.
    """

    case: Case
    mask: BlockMask | None
    right: Expected
    undecided: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Answer:
    """What a backend computed: output and log-sum-exp under the question's mask, and the mask that it selects.

    The log-sum-exp is that of a call of its own: a kernel may compute in another way where it is asked for.
    """

    question: Question
    under: Outcome
    selected: np.ndarray | None


def compare(
    backend_a: str,
    backend_b: str,
    cases: Iterable[Case],
    device_a: str | None = None,
    device_b: str | None = None,
) -> list[CaseComparison]:
    """Run `cases` on two backends and compare masks, outputs and log-sum-exp.

    Raises:
        BackendError: one of them is unknown, does not load, or has no such device.
    """
    a, b = find_target(backend_a, device_a), find_target(backend_b, device_b)
    return [compare_case(a, b, case) for case in cases]


def compare_case(a: Target, b: Target, case: Case) -> CaseComparison:
    """Run one case on two targets."""
    refused = "; ".join(f"{target}: {said}" for target in (a, b) if (said := target.objections(case)))
    if refused:
        return CaseComparison(case.name, refused=refused)
    asked = question(case)
    lse = a.capabilities.lse and b.capabilities.lse
    ours, theirs = (answer(target, asked, lse=lse) for target in (a, b))
    right = asked.right
    absolute = worst_error(theirs.under.out, ours.under.out)
    lse_error = worst_error(theirs.under.lse, ours.under.lse) if lse else None  # type: ignore[arg-type]
    mask_agreement, same_choice = _same_choice(asked, ours.selected, theirs.selected)
    return CaseComparison(
        case.name,
        ok=same_choice and absolute <= 2 * right.out_limit and (lse_error or 0.0) <= 2 * right.lse_limit,
        absolute=absolute,
        relative=relative_error(theirs.under.out, ours.under.out),
        lse=lse_error,
        mask_agreement=mask_agreement,
        tolerance=2 * right.out_limit,
        answer=ours,
    )


def question(case: Case) -> Question:
    """The case with its right answer."""
    if not case.selects:
        mask = None if case.plan().is_dense else case.mask()
        return Question(case, mask, expected(case, mask), None)
    right = expected_mask(case)
    mask = BlockMask(right.blocks, case.problem.q_len, case.problem.kv_len, case.layout.block)
    return Question(case, mask, expected(case, mask), right.undecided)


def answer(target: Target, asked: Question, *, lse: bool) -> Answer:
    """What a target makes of a question."""
    selected = target.selected(asked.case).blocks if asked.case.selects else None
    plain = target.under(asked.case, asked.mask, lse=False)
    return Answer(
        asked, replace(plain, lse=target.under(asked.case, asked.mask, lse=True).lse if lse else None), selected
    )


def _same_choice(asked: Question, ours: Any, theirs: Any) -> tuple[float | None, bool]:
    """How far two selected masks agree, and whether they differ at near ties only."""
    if asked.undecided is None:
        return None, True
    return agreement(ours, theirs), not np.any((ours != theirs) & ~asked.undecided)
