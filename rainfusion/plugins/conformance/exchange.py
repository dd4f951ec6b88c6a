"""Parity between machines that never meet: what a report holds of every case, and how two reports are compared.

Each machine measures its backend against the float64 oracle that it computes itself, and writes down what the other
one needs to see that both answered one question with one answer:

- digests of the inputs, and the mask under which the output was computed: the question. Another one is refused.
- a sketch of the oracle's output: that both oracles are one.
- the error against it and what is allowed: two backends are at most the sum of their errors apart.
- a sketch of the backend's own output: how far the two really are apart, over all elements.
- the bits of the mask it selects, and the pairs that near ties leave open.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rainfusion.core.errors import RainfusionError
from rainfusion.plugins.conformance.cases import Case
from rainfusion.plugins.conformance.environment import environment
from rainfusion.plugins.conformance.measure import agreement, relative_error, worst_error
from rainfusion.plugins.conformance.parity import Answer, CaseComparison
from rainfusion.plugins.conformance.report import KIT_REVISION
from rainfusion.plugins.conformance.sketch import SIZE, digest, pattern, rms_difference, sketch
from rainfusion.plugins.conformance.target import Target

PARITY_VERSION = 1

ORACLE_RTOL = 2.0**-30
"""How far two oracles may be apart, as a share of the oracle's root mean square: float64 on two processors."""

SKETCH_FACTOR, SKETCH_RTOL = 1.5, 2.0**-48
"""Room for the estimate of a sketch, and for the rounding of its sums."""

TOLERANCE_FACTOR = 4.0
"""How much more one report may allow than the other: float32 semantics on two processors."""

_MOST_BYTES = 256 << 20
_MOST_PAIRS = 1 << 24


class ReportError(RainfusionError, ValueError):
    """A file that is no parity report, or two reports that cannot be compared."""


# -- writing ---------------------------------------------------------------------------------------


def report_of(pair: tuple[Target, Target], cases: Sequence[Case], compared: Sequence[CaseComparison]) -> dict[str, Any]:
    """The report of a comparison: who, where, whether they agree, and every case with its evidence. JSON."""
    verdicts = [comparison.ok for comparison in compared]
    return {
        "rainfusion_parity": PARITY_VERSION,
        "kit": KIT_REVISION,
        "environment": environment(),
        "backend": _side(pair[0]),
        "against": _side(pair[1]),
        "agree": True in verdicts and False not in verdicts,
        "agreed": verdicts.count(True),
        "disagreed": verdicts.count(False),
        "refused": verdicts.count(None),
        "cases": [_entry(case, comparison) for case, comparison in zip(cases, compared, strict=True)],
    }


def _side(target: Target) -> dict[str, Any]:
    return {
        "backend": target.backend.name,
        "revision": target.revision,
        "device": str(target.device),
        "device_name": target.device.name,
        "stand_in": target.stand_in,
    }


def _entry(case: Case, comparison: CaseComparison) -> dict[str, Any]:
    head = {"case": case.name, "seed": case.seed}
    if comparison.answer is None:
        return {**head, "agree": None, "refused": comparison.refused}
    numbers = ("absolute", "relative", "lse", "mask_agreement", "tolerance")
    return {
        **head,
        "agree": comparison.ok,
        "inputs": case.fingerprint(),
        **{name: _plain(getattr(comparison, name)) for name in numbers},
        "evidence": _evidence(comparison.answer),
    }


def _evidence(answer: Answer) -> dict[str, Any]:
    right, out, lse = answer.question.right, answer.under.out, answer.under.lse
    mask = answer.question.mask
    return {
        "elements": out.size,
        "error": _plain(worst_error(out, right.out)),
        "relative": _plain(relative_error(out, right.out)),
        "allowed": right.out_limit,
        "lse_error": None if lse is None else _plain(worst_error(lse, right.lse)),
        "lse_allowed": right.lse_limit,
        "bits": digest(out),
        "pattern": pattern(out),
        "out": sketch(out),
        "oracle": sketch(right.out),
        "pairs": None if mask is None else list(mask.blocks.shape),
        "mask": None if mask is None else _packed(mask.blocks),
        "selected": None if answer.selected is None else _packed(answer.selected),
        "undecided": None if answer.question.undecided is None else _packed(answer.question.undecided),
    }


def _packed(blocks: np.ndarray) -> str:
    return base64.b64encode(np.packbits(blocks).tobytes()).decode()


def _plain(value: float | None) -> float | str | None:
    """JSON has no infinity and no NaN; they are written as text."""
    return value if value is None or math.isfinite(value) else str(value)


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entry:
    """What a report says of one case; see `_evidence`."""

    inputs: str
    seed: int
    elements: int
    error: float
    relative: float
    allowed: float
    lse_error: float | None
    lse_allowed: float
    bits: str
    pattern: str
    out: list[float]
    oracle: list[float]
    mask: np.ndarray | None
    selected: np.ndarray | None
    undecided: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Report:
    """A parity report that was read.

    Attributes:
        who: backend, device and machine in words.
        cases: evidence by name; the reason as text where the backend does not claim the case.
    """

    who: str
    kit: int
    cases: dict[str, Entry | str]

    def only(self, wanted: Callable[[str], bool]) -> Report:
        """The same report with the cases of wanted names alone."""
        return replace(self, cases={name: entry for name, entry in self.cases.items() if wanted(name)})


def read_report(path: Path) -> Report:
    """Read a report that ``rainfusion parity --report`` wrote; nothing in it is trusted.

    Raises:
        ReportError: the file cannot be read, or is not such a report.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["rainfusion_parity"] != PARITY_VERSION:
            raise ValueError(f"format {record['rainfusion_parity']!r}; this rainfusion reads {PARITY_VERSION}")
        cases = {_text(entry["case"]): _read(entry) for entry in record["cases"]}
        return Report(_who(record["backend"], record["environment"]), int(record["kit"]), cases)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ReportError(
            f"{path} is not a parity report ({said}); write one with rainfusion parity --report"
        ) from error


def _who(side: dict[str, Any], environment: dict[str, Any]) -> str:
    device, cpu = _text(side["device_name"]), _text(environment["cpu"])
    where = device if cpu in device else f"{device}, {cpu}"
    imitated = f", imitated by {_text(side['stand_in'])}" if side["stand_in"] else ""
    return f"{_text(side['backend'])} on {_text(side['device'])} ({where}{imitated})"


def _text(value: Any) -> str:
    """Text that is safe to print."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value)[:300])


def _read(entry: dict[str, Any]) -> Entry | str:
    if entry.get("refused"):
        return _text(entry["refused"])
    seen = entry["evidence"]
    shape = None if seen["pairs"] is None else tuple(int(n) for n in seen["pairs"])
    if shape is not None and (len(shape) != 4 or min(shape) < 1 or math.prod(shape) > _MOST_PAIRS):
        raise ValueError(f"{shape} block pairs")
    return Entry(
        inputs=str(entry["inputs"]),
        seed=int(entry["seed"]),
        elements=max(1, int(seen["elements"])),
        error=_number(seen["error"]),
        relative=_number(seen["relative"]),
        allowed=_number(seen["allowed"]),
        lse_error=None if seen["lse_error"] is None else _number(seen["lse_error"]),
        lse_allowed=_number(seen["lse_allowed"]),
        bits=str(seen["bits"]),
        pattern=str(seen["pattern"]),
        out=_numbers(seen["out"]),
        oracle=_numbers(seen["oracle"]),
        **{name: _unpacked(seen[name], shape) for name in ("mask", "selected", "undecided")},
    )


def _number(value: Any) -> float:
    """A number that is not NaN, so that it compares."""
    number = float(value)
    return math.inf if math.isnan(number) else number


def _numbers(values: Any) -> list[float]:
    numbers = [float(value) for value in values]
    if len(numbers) != SIZE or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a sketch is {SIZE} numbers")
    return numbers


def _unpacked(text: Any, shape: tuple[int, ...] | None) -> np.ndarray | None:
    if text is None or shape is None:
        return None
    bits = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(bits) != -(-math.prod(shape) // 8):
        raise ValueError(f"a mask of {len(bits)} bytes for {shape} block pairs")
    return np.unpackbits(bits, count=math.prod(shape)).astype(bool).reshape(shape)


# -- comparing -------------------------------------------------------------------------------------


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
