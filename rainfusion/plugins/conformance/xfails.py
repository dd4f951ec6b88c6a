"""Known failures: a TOML file of tests that are expected to fail, each with its reason and issue.

    [[xfail]]
    test = "test_attend[large_logits-*]"
    reason = "logits are accumulated in float16"
    issue = "https://github.com/acme/acme-rainfusion/issues/7"
    device = "Acme 1*"

In `test` and `device`, ``*`` stands for anything; nothing else is special. `device` may be left out; it is held
against the address and the name of the device, and an entry about another device is passed over. An entry
whose test passes, or that names no test, is stale and fails the run.
"""

from __future__ import annotations

import re
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Xfail:
    """One known failure."""

    test: str
    reason: str
    issue: str
    device: str = "*"

    @property
    def said(self) -> str:
        """Reason and issue, as reports give them."""
        return f"{self.reason} ({self.issue})"

    def matches(self, name: str) -> bool:
        """Whether it is about the test of that name, such as ``test_attend[video-f32]``."""
        return _is_like(self.test, name)

    def applies_to(self, *names: str) -> bool:
        """Whether it is about the device of that address or name."""
        return any(_is_like(self.device, name) for name in names)


def _is_like(pattern: str, text: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), text) is not None


def read_xfails(path: Path) -> tuple[Xfail, ...]:
    """The entries of a file.

    Raises:
        ValueError: not TOML, or an entry without a test, a reason and an issue.
        OSError: the file cannot be read.
    """
    required = {f.name for f in fields(Xfail) if f.default is MISSING}
    known = {f.name for f in fields(Xfail)}
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    if {*document} - {"xfail"}:
        raise ValueError(f"{path}: unknown keys {sorted({*document} - {'xfail'})}; give [[xfail]] entries")
    for entry in document.get("xfail", []):
        texts = all(isinstance(text, str) and text.strip() for text in entry.values())
        if not (required <= {*entry} <= known and texts):
            raise ValueError(f"{path}: {entry} needs {', '.join(sorted(required))} and may have device, none empty")
    return tuple(Xfail(**entry) for entry in document.get("xfail", []))
