"""Targets: chips, and backends on a chip with what they are meant to run there (``targets.toml``, see README.md).

A chip with `evidence` "emulated" or "contract" is a stand-in: an interpreter, or libraries that only check calls.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from rainfusion.core.checks import shown
from rainfusion.core.errors import RainfusionError
from rainfusion.core.files import read_regular
from rainfusion.core.problem import DTYPES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HARDWARE, EMULATED, CONTRACT = "hardware", "emulated", "contract"
ANY = "any"
_MOST_BYTES = 2**20
T = TypeVar("T")


class MatrixError(RainfusionError, ValueError):
    """Targets or records that are malformed or do not fit together."""


@dataclass(frozen=True)
class Chip:
    """A piece of hardware, or what stands in for one.

    Attributes:
        key: its name in targets and files.
        recognise: patterns of the name it gives itself, ``*`` for anything.
        tflops: dense peak by dtype; bandwidth: TB/s of its memory; `source` says where from.
    """

    key: str
    name: str
    architecture: str
    vendor: str = ""
    recognise: tuple[str, ...] = ()
    evidence: str = HARDWARE
    tflops: Mapping[str, float] = field(default_factory=dict)
    bandwidth: float | None = None
    source: str = ""

    @property
    def title(self) -> str:
        """Vendor and name."""
        return f"{self.vendor} {self.name}".strip()

    def is_called(self, name: str) -> bool:
        """Whether a device of that name is this chip."""
        return any(fnmatchcase(name, pattern) for pattern in self.recognise)


@dataclass(frozen=True)
class Target:
    """A backend on a chip."""

    backend: str
    chip: Chip
    device: str = ""
    runtime: str = ""
    dtypes: tuple[str, ...] = ()
    blocks: Any = ANY
    head_dims: Any = ANY
    unsupported: Mapping[str, str] | str = field(default_factory=dict)
    stand_in: str = ""
    environ: Mapping[str, str] = field(default_factory=dict)
    benchmark: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Backend and chip: the stem of its record's file."""
        return f"{self.backend}-{self.chip.key}"

    def why_not(self, dtype: str) -> str:
        """Why a dtype is not supported; empty where it is."""
        return self.unsupported if isinstance(self.unsupported, str) else self.unsupported.get(dtype, "")


def read_targets(path: Path) -> tuple[dict[str, Chip], dict[str, Target]]:
    """Chips by key and targets by name.

    Raises:
        MatrixError: the file cannot be read, or an entry is malformed; the message names it.
    """
    document = read_toml(path)
    _refuse_unknown(document, {"chips", "target"}, str(path))
    tables, entries = document.get("chips", {}), document.get("target", [])
    if not (isinstance(tables, dict) and isinstance(entries, list)):
        raise MatrixError(f"{path}: chips are tables [chips.NAME], targets are tables [[target]]")
    chips = {key: _chip(key, entry) for key, entry in tables.items()}
    listed = [_target(entry, chips) for entry in entries]
    targets = {target.name: target for target in listed}
    for target in listed:
        if targets[target.name] is not target:
            raise MatrixError(f"target {target.name} is listed twice")
        other = targets.get(target.stand_in)
        if target.stand_in and (not other or other.backend != target.backend or other.chip.evidence == HARDWARE):
            raise MatrixError(f"target {target.name}: stand_in {target.stand_in!r} is no stand-in for {target.backend}")
    return chips, targets


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file; MatrixError where it cannot be read."""
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise MatrixError(f"{path} is not TOML: {str(error)[:200]}") from error


def read_text(path: Path) -> str:
    """A text file of the folder, which may be somebody else's: a regular one, of a size that such files have.

    Raises:
        MatrixError: it cannot be read, or is another kind of file, larger, or not UTF-8.
    """
    try:
        return read_regular(path, _MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise MatrixError(
            f"{path} cannot be read ({error.strerror}); run in a checkout of rainfusion, or give --folder"
        ) from error
    except ValueError as error:  # not a regular file, or not UTF-8
        raise MatrixError(f"{path} cannot be read: {error}") from error


def _chip(key: str, entry: Any) -> Chip:
    if not isinstance(entry, dict):
        raise MatrixError(f"chip {key} is {shown(entry)}; give a table")
    chip = _built(Chip, f"chip {key}", {**entry, "key": key})
    if chip.evidence not in (HARDWARE, EMULATED, CONTRACT):
        raise MatrixError(f"chip {key} has evidence {chip.evidence!r}; give {HARDWARE}, {EMULATED} or {CONTRACT}")
    if (chip.tflops or chip.bandwidth) and not chip.source:
        raise MatrixError(f"chip {key} has figures without a source; name the data sheet")
    return chip


def _target(entry: Any, chips: Mapping[str, Chip]) -> Target:
    if not isinstance(entry, dict):
        raise MatrixError(f"target {shown(entry)} is no table")
    if not all(isinstance(entry.get(name), str) for name in ("backend", "chip")):
        raise MatrixError(f"target {shown(entry)} lacks its names; give backend and chip as text")
    what = f"target {entry['backend']}-{entry['chip']}"
    if entry["chip"] not in chips:
        raise MatrixError(f"{what} names no chip; give one of {', '.join(chips)}")
    target = _built(Target, what, {**entry, "chip": chips[entry["chip"]]})
    for name in ("blocks", "head_dims"):
        if not _is_claim(getattr(target, name)):
            raise MatrixError(f"{what}: {name} = {shown(entry[name])} is neither {ANY!r} nor a list of whole numbers")
    if isinstance(target.unsupported, str):
        return target
    missing = [name for name in ("device", "runtime", "dtypes") if not getattr(target, name)]
    if missing:
        raise MatrixError(f"{what} lacks {', '.join(missing)}")
    _refuse_unknown({*target.dtypes, *target.unsupported}, DTYPES, what)
    for dtype in DTYPES:
        if (dtype in target.dtypes) == bool(target.why_not(dtype)):
            raise MatrixError(f"{what}: {dtype} must be either in dtypes or, with a reason, in unsupported")
    return target


def _built(kind: type[T], what: str, entry: dict[str, Any]) -> T:
    known = fields(kind)  # type: ignore[arg-type]
    _refuse_unknown(entry, {f.name for f in known}, what)
    required = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
    if required - {*entry}:
        raise MatrixError(f"{what} lacks {', '.join(sorted(required - {*entry}))}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    for key, due in get_type_hints(kind).items():
        if key in values and not _is(values[key], due):
            raise MatrixError(f"{what}: {key} = {shown(entry[key])} is not {_WORDS[due]}")
    return kind(**values)


_WORDS = {
    str: "text",
    tuple[str, ...]: "a list of texts",
    Mapping[str, str]: "a table of texts",
    Mapping[str, str] | str: "text, or a table of texts",
    Mapping[str, float]: "a table of numbers",
    float | None: "a number",
}


def _is(value: Any, due: Any) -> bool:
    """Whether a value of a file is of an annotated type, as far as these classes use types."""
    if isinstance(due, UnionType):
        return any(_is(value, kind) for kind in get_args(due))
    if due is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    origin = get_origin(due)
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(_is(item, get_args(due)[1]) for item in value.values())
    return due is Any or isinstance(value, due)


def _is_claim(value: Any) -> bool:
    """Whether a value says which blocks or head dims are claimed: any, numbers, or pairs of them."""
    if value == ANY:
        return True
    numbers = [item if isinstance(item, list) else [item] for item in value] if isinstance(value, tuple) else [[None]]
    same = len({isinstance(item, list) for item in value}) < 2  # they are sorted for the page
    return same and all(type(number) is int for item in numbers for number in item)


def _refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    unknown = sorted({*given} - {*known})
    if unknown:
        raise MatrixError(f"{what}: {', '.join(unknown)} is not known; give {', '.join(sorted(known))}")
