"""Parity between machines that never meet: what a report holds of every case. `agreement` compares two of them.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rainfusion.core.errors import RainfusionError
from rainfusion.plugins.conformance.cases import Case
from rainfusion.plugins.conformance.environment import environment
from rainfusion.plugins.conformance.measure import relative_error, worst_error
from rainfusion.plugins.conformance.parity import Answer, CaseComparison
from rainfusion.plugins.conformance.report import KIT_REVISION
from rainfusion.plugins.conformance.sketch import SIZE, digest, pattern, sketch
from rainfusion.plugins.conformance.target import Target

PARITY_VERSION = 1

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
