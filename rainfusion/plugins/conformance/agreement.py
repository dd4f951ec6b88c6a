"""Two parity reports compared: did two machines give one answer to one question?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rainfusion.plugins.conformance.exchange import Entry, Report, ReportError
from rainfusion.plugins.conformance.measure import agreement
from rainfusion.plugins.conformance.sketch import SIZE, rms_difference

ORACLE_RTOL = 2.0**-30
"""How far two oracles may be apart, as a share of the oracle's root mean square: float64 on two processors."""

SKETCH_FACTOR, SKETCH_RTOL = 1.5, 2.0**-48
"""Room for the estimate of a sketch, and for the rounding of its sums."""

TOLERANCE_FACTOR = 4.0
"""How much more one report may allow than the other: float32 semantics on two processors."""


@dataclass(frozen=True)
class Agreement:
    """How far the backends of two reports are apart on one case.

    Attributes:
        ok: whether they agree; None where one of them does not claim the case.
        why: what speaks against it.
        bound: the outputs differ by no more, at any element: the sum of both errors against the oracle, and how far
            the two machines' oracles are apart (nothing, seen from any dtype but float64).
        relative: the same as a share of the largest value.
        allowed: largest allowed `bound`.
        rms: estimated root mean square difference of the outputs.
        lse: bound of the log-sum-exp's difference; None where one of them does not claim it.
        mask_agreement: share of block pairs on which the selected masks agree; None where none is selected.
        same_bits: whether the outputs are equal bit by bit.
    """

    case: str
    ok: bool | None
    why: str = ""
    bound: float = 0.0
    relative: float = 0.0
    allowed: float = 0.0
    rms: float = 0.0
    lse: float | None = None
    mask_agreement: float | None = None
    same_bits: bool = False


def compare_reports(a: Report, b: Report) -> list[Agreement]:
    """Compare the cases that both reports have.

    Raises:
        ReportError: other inputs, another kit, or no case in common: there is nothing to compare.
    """
    if a.kit != b.kit:
        raise ReportError(
            f"the reports were made with revisions {a.kit} and {b.kit} of the conformance kit, which measure "
            "differently; make both with one rainfusion"
        )
    shared = [name for name in a.cases if name in b.cases]
    if not shared:
        raise ReportError("the reports have no case in common; make both with the same --cases")
    pairs = [(name, a.cases[name], b.cases[name]) for name in shared]
    _refuse_other_inputs(pairs)
    return [_compare(name, x, y) for name, x, y in pairs]


def _refuse_other_inputs(pairs: list[tuple[str, Entry | str, Entry | str]]) -> None:
    both = [(name, x, y) for name, x, y in pairs if isinstance(x, Entry) and isinstance(y, Entry)]
    other = [(name, x, y) for name, x, y in both if x.inputs != y.inputs]
    if other:
        name, x, y = other[0]
        seeds = f" (seeds {x.seed} and {y.seed})" if x.seed != y.seed else ""
        raise ReportError(
            f"the reports were made of other inputs{seeds}: {len(other)} of {len(both)} cases differ, the first is "
            f"{name}; make both with the same --seed and one rainfusion"
        )


def _compare(name: str, a: Entry | str, b: Entry | str) -> Agreement:
    if isinstance(a, str) or isinstance(b, str):
        said = dict.fromkeys(reason for reason in (a, b) if isinstance(reason, str))
        return Agreement(name, None, "; ".join(said))
    if not _same(a.mask, b.mask):
        return Agreement(name, None, "the two oracles choose other blocks, so the outputs stand under different masks")
    if a.elements != b.elements:
        return Agreement(name, False, "the outputs are of different sizes")
    problems = [problem for i, x in enumerate((a, b)) for problem in _own_problems(("first", "second")[i], x)]
    problems += _problems_between(a, b)
    return Agreement(
        name,
        ok=not problems,
        why="; ".join(problems),
        bound=a.error + b.error + rms_difference(a.oracle, b.oracle, a.elements),
        relative=a.relative + b.relative,
        allowed=a.allowed + b.allowed,
        rms=rms_difference(a.out, b.out, a.elements),
        lse=None if a.lse_error is None or b.lse_error is None else a.lse_error + b.lse_error,
        mask_agreement=None if a.selected is None or b.selected is None else agreement(a.selected, b.selected),
        same_bits=a.bits == b.bits,
    )


def _own_problems(which: str, x: Entry) -> Iterator[str]:
    """What speaks against one report on its own: its errors, and an output that is not where it says."""
    if x.error > x.allowed:
        yield f"the {which} is off the oracle by {x.error:.3g} (at most {x.allowed:.3g})"
    if (x.lse_error or 0.0) > x.lse_allowed:
        yield f"the {which}'s log-sum-exp is off by {x.lse_error:.3g} (at most {x.lse_allowed:.3g})"
    if rms_difference(x.out, x.oracle, x.elements) > SKETCH_FACTOR * x.error + _rounding(x):
        yield f"the {which}'s output is farther from the oracle than its report says"


def _problems_between(a: Entry, b: Entry) -> Iterator[str]:
    """What speaks against the two being one answer to one question."""
    apart = rms_difference(a.oracle, b.oracle, a.elements)
    if apart > ORACLE_RTOL * _rms(a):
        yield f"the two oracles are {apart:.3g} apart"
    if a.pattern != b.pattern:
        yield "NaN or infinity stand elsewhere"
    if rms_difference(a.out, b.out, a.elements) > SKETCH_FACTOR * (a.error + b.error) + _rounding(a):
        yield "the outputs are farther apart than both errors allow"
    if max(a.allowed, b.allowed) > TOLERANCE_FACTOR * min(a.allowed, b.allowed):
        yield f"one allows an error of {a.allowed:.3g}, the other of {b.allowed:.3g}: that is not one rule"
    if a.selected is None or b.selected is None:
        if a.selected is not b.selected:
            yield "only one report has the mask that its backend selects"
        return
    open_pairs = np.zeros(a.selected.shape, bool)
    for x in (a, b):
        open_pairs |= False if x.undecided is None else x.undecided
    wrong = int(((a.selected != b.selected) & ~open_pairs).sum())
    if wrong:
        yield f"{wrong} of {a.selected.size} block pairs are chosen otherwise, and not by near ties"


def _rms(x: Entry) -> float:
    return rms_difference(x.oracle, [0.0] * SIZE, x.elements)


def _rounding(x: Entry) -> float:
    return SKETCH_RTOL * _rms(x)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)
