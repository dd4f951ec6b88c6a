"""The entry points of all installed distributions, each read in a try of its own: one that is broken costs a row."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

from rainfusion.core.choice import Refusal
from rainfusion.core.errors import FAILURES, said

GROUP = "rainfusion"
OURS = "rainfusion"  # the distribution that this package comes from


def entries() -> tuple[list[EntryPoint], list[Refusal]]:
    """The entry points of the group, and the distributions whose metadata cannot be read.

    Of distributions of one name, the first on the path counts, as for an import.
    """
    found: list[EntryPoint] = []
    broken: list[Refusal] = []
    seen: set[str] = set()
    for place in [*sys.path]:
        try:
            for distribution in distributions(path=[place]):
                name = _name(distribution)
                key = re.sub(r"[-_.]+", "-", name).lower()
                if key in seen:
                    continue
                seen.add(key)
                found += _entries_of(distribution, name, broken)
        except FAILURES as error:
            broken.append(Refusal(str(place), "load", f"what is installed there cannot be listed: {said(error)}"))
    return found, broken


def origin(entry: EntryPoint) -> str:
    """The name of a plugin, and the distribution it comes from."""
    return f"{entry.name} ({distribution_of(entry)})"


def distribution_of(entry: EntryPoint) -> str:
    """The name of the distribution that declares an entry point."""
    return _name(entry.dist) if entry.dist is not None else "unknown distribution"


def is_builtin(entry: EntryPoint) -> bool:
    """Whether a plugin is one of this package's own."""
    return distribution_of(entry) == OURS and entry.value.startswith(f"{OURS}.")


def _entries_of(distribution: Distribution, name: str, broken: list[Refusal]) -> Iterator[EntryPoint]:
    try:
        yield from [entry for entry in distribution.entry_points if entry.group == GROUP]
    except FAILURES as error:
        reason = f"the metadata of distribution {name} cannot be read, reinstall or remove it: {said(error)}"
        broken.append(Refusal(name, "load", reason))


def _name(distribution: Distribution) -> str:
    """Its name; its folder's where the metadata has none."""
    try:
        name = distribution.metadata["Name"]
    except FAILURES:
        name = None
    if isinstance(name, str) and name:
        return name
    folder: Any = getattr(distribution, "_path", None)
    return str(getattr(folder, "name", "") or folder or "unknown distribution")
