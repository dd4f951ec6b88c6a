"""Observation: what one backend did on one case; the verdict on one, and the agreement of two.

The backend is measured against the float64 oracle that the same machine computes. What another machine needs to see
that both answered one question with one answer is kept, about a kilobyte of JSON (docs/parity.md).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from rainfusion.testing.numbers import SIZE, rms_difference

ORACLE_RTOL = 2.0**-30
"""How far two oracles may be apart, as a share of the oracle's root mean square: float64 on two processors."""

SKETCH_FACTOR, SKETCH_RTOL = 1.5, 2.0**-48
"""Room for the estimate of a sketch, and for the rounding of its sums."""

TOLERANCE_FACTOR = 4.0
"""How much more one machine may allow than the other: definitions in float32 on two processors."""

_MOST_PAIRS = 1 << 24


@dataclass(frozen=True, eq=False)
class Observation:
    """What one backend did on one case.

    Attributes:
        level: ``"attend"`` (under a given mask), ``"select"`` (the mask alone) or ``"attention"`` (the whole call).
        case, dtype, seed, inputs: the question; `inputs` is a digest of q, k and v.
        error, allowed, largest: worst absolute error of the output, None where there is none, the largest allowed one,
            and the largest value of the oracle's output; lse_error, lse_allowed: of the log-sum-exp.
        elements, bits, pattern: size of the output; digests of its bits, and of where NaN and infinity are.
        out, oracle: sketches of the backend's and of the oracle's output (`rainfusion.testing.numbers`).
        mask: the given mask, or the one that is right to select; None for dense attention.
        selected, undecided: the mask that the backend selected, and the pairs on which it may differ from `mask`.
        problems: what is wrong beside all this.
        refused: which capability is not claimed; nothing was observed then.
    """

    level: str
    case: str
    dtype: str = ""
    seed: int = 0
    inputs: str = ""
    error: float | None = None
    allowed: float = 0.0
    largest: float = 0.0
    lse_error: float | None = None
    lse_allowed: float = 0.0
    elements: int = 0
    bits: str = ""
    pattern: str = ""
    out: list[float] | None = None
    oracle: list[float] | None = None
    mask: np.ndarray | None = None
    selected: np.ndarray | None = None
    undecided: np.ndarray | None = None
    problems: tuple[str, ...] = ()
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields that hold something; masks and sketches as base64, infinities as text."""
        held = [(f.name, x, f.default) for f in fields(self) if (x := getattr(self, f.name)) is not None]
        return {name: _WRITERS.get(name, plain)(x) for name, x, default in held if default is None or x != default}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Observation:
        """Read what `to_json` gave; nothing in it is trusted, and what is malformed raises what Python does."""
        return cls(**{key: _READERS[key](value) for key, value in record.items()})


def verdict(seen: Observation) -> list[str]:
    """What is wrong with an observation; empty where the backend is right."""
    found = list(seen.problems)
    if seen.error is not None and not seen.error <= seen.allowed:
        found.append(f"the output is off by {seen.error:.3g} (at most {seen.allowed:.3g})")
    if seen.lse_error is not None and not seen.lse_error <= seen.lse_allowed:
        found.append(f"the log-sum-exp is off by {seen.lse_error:.3g} (at most {seen.lse_allowed:.3g})")
    if _apart(seen.out, seen.oracle, seen) > _room(seen.error or 0.0, seen):
        found.append("the output is farther from the oracle than its error says")
    if wrong := _otherwise(seen.selected, seen.mask, seen.undecided):
        found.append(f"{wrong} block pairs are chosen wrongly, and not by near ties")
    return found


@dataclass(frozen=True)
class Agreement:
    """How far two backends are apart on one case.

    Attributes:
        ok: whether they agree, None where they were not compared; why: what speaks against it.
        bound: the outputs differ by no more, at any element: the sum of both errors against the oracle, and how far the
            two oracles are apart; None where each was computed under a mask of its own. allowed: the largest allowed.
        relative: `bound` as a share of the largest value; rms: estimated root mean square difference.
        lse: bound of the log-sum-exp's difference.
        same_mask: share of block pairs on which the selected masks agree.
        same_bits: whether the outputs are equal bit by bit.
    """

    level: str
    case: str
    ok: bool | None
    why: str = ""
    bound: float | None = None
    relative: float | None = None
    allowed: float = 0.0
    rms: float | None = None
    lse: float | None = None
    same_mask: float | None = None
    same_bits: bool = False


def agree(a: Observation, b: Observation) -> Agreement:
    """Compare two observations of one case, made here or read from files."""
    if reason := _not_comparable(a, b):
        return Agreement(a.level, a.case, None, reason)
    problems = [f"the {name}: {said}" for name, x in (("first", a), ("second", b)) for said in verdict(x)]
    problems += _problems_between(a, b)
    seen = Agreement(a.level, a.case, not problems, "; ".join(problems), allowed=a.allowed + b.allowed)
    if a.selected is not None and b.selected is not None:
        seen = replace(seen, same_mask=float(np.mean(a.selected == b.selected)))
    if a.error is None or b.error is None or not _same(a.selected, b.selected):
        return seen
    bound = a.error + b.error + _apart(a.oracle, b.oracle, a)
    return replace(
        seen,
        bound=bound,
        relative=bound / (a.largest or 1.0),
        rms=None if a.out is None or b.out is None else _apart(a.out, b.out, a),
        lse=None if a.lse_error is None or b.lse_error is None else a.lse_error + b.lse_error,
        same_bits=a.bits == b.bits,
    )


def _not_comparable(a: Observation, b: Observation) -> str:
    if a.refused or b.refused:
        return "; ".join(dict.fromkeys(filter(None, (a.refused, b.refused))))
    if not all(x.pattern or x.selected is not None for x in (a, b)):
        return "a report of an older format holds errors only; record it again"
    same = _same(a.mask, b.mask)
    return "" if same else "the two oracles choose other blocks, so the outputs are under different masks"


def _problems_between(a: Observation, b: Observation) -> Iterator[str]:
    """What speaks against the two being one answer to one question."""
    if a.elements != b.elements:
        yield "the outputs are of different sizes"
        return
    apart = _apart(a.oracle, b.oracle, a)
    if apart > ORACLE_RTOL * _rms(a):
        yield f"the two oracles are {apart:.3g} apart"
    if a.pattern != b.pattern:
        yield "NaN or infinity are elsewhere"
    if _apart(a.out, b.out, a) > _room((a.error or 0.0) + (b.error or 0.0), a):
        yield "the outputs are farther apart than both errors allow"
    if max(a.allowed, b.allowed) > TOLERANCE_FACTOR * min(a.allowed, b.allowed):
        yield f"one allows an error of {a.allowed:.3g}, the other of {b.allowed:.3g}: that is not one rule"
    if (a.selected is None) != (b.selected is None):
        yield "only one report has the mask that its backend selects"
    elif wrong := _otherwise(a.selected, b.selected, a.undecided, b.undecided):
        yield f"{wrong} block pairs are chosen otherwise, and not by near ties"


def _otherwise(a: np.ndarray | None, b: np.ndarray | None, *undecided: np.ndarray | None) -> str:
    """On how many pairs two masks differ that are not undecided, in words; empty where on none."""
    if a is None or b is None:
        return ""
    if a.shape != b.shape:
        return f"all ({a.shape} where {b.shape} are due)"
    wrong = a != b
    for pairs in undecided:
        wrong &= True if pairs is None else ~pairs
    return f"{int(wrong.sum())} of {wrong.size}" if wrong.any() else ""


def _apart(a: list[float] | None, b: list[float] | None, x: Observation) -> float:
    return 0.0 if a is None or b is None else rms_difference(a, b, max(x.elements, 1))


def _rms(x: Observation) -> float:
    return _apart(x.oracle, [0.0] * SIZE, x)


def _room(error: float, x: Observation) -> float:
    return SKETCH_FACTOR * error + SKETCH_RTOL * _rms(x)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


# -- JSON ------------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """Text that is safe to print."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value)[:300])


def plain(value: Any) -> Any:
    """JSON has no infinity and no NaN; they are written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    """A number that is not NaN, so that it compares."""
    return math.inf if math.isnan(number := float(value)) else number


def _packed(x: np.ndarray) -> str:
    return base64.b64encode(x.tobytes()).decode()


def _sums(value: Any) -> list[float]:
    sums = np.frombuffer(base64.b64decode(value, validate=True), "<f8")
    if len(sums) != SIZE or not np.isfinite(sums).all():
        raise ValueError(f"a sketch is {SIZE} numbers")
    return [float(x) for x in sums]


def _mask(value: Any) -> np.ndarray:
    shape, bits = tuple(int(n) for n in value[:-1]), value[-1]
    if len(shape) != 4 or min(shape) < 1 or math.prod(shape) > _MOST_PAIRS:
        raise ValueError(f"{shape} block pairs")
    packed = np.frombuffer(base64.b64decode(bits, validate=True), dtype=np.uint8)
    if len(packed) != -(-math.prod(shape) // 8):
        raise ValueError(f"a mask of {len(packed)} bytes for {shape} block pairs")
    return np.unpackbits(packed, count=math.prod(shape)).astype(bool).reshape(shape)


_MASKS, _SKETCHES = ("mask", "selected", "undecided"), ("out", "oracle")
_WRITERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(_MASKS, lambda blocks: [*blocks.shape, _packed(np.packbits(blocks))]),
    **dict.fromkeys(_SKETCHES, lambda sums: _packed(np.asarray(sums, "<f8"))),
}
_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("level", "case", "dtype", "inputs", "bits", "pattern", "refused"), text),
    **dict.fromkeys(("seed", "elements"), int),
    **dict.fromkeys(("error", "allowed", "largest", "lse_error", "lse_allowed"), _number),
    **dict.fromkeys(_MASKS, _mask),
    **dict.fromkeys(_SKETCHES, _sums),
    "problems": lambda value: tuple(map(text, value)),
}
