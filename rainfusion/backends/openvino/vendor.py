"""openvino, imported without its telemetry unless the user turned that on.

The import of openvino's Python package reports itself to a web service and writes into the home folder, through the
package openvino_telemetry, which is optional: where it cannot be imported, openvino goes on without. So it is hidden
for as long as openvino is imported, unless ``RAINFUSION_OPENVINO_TELEMETRY=1``, or the user has agreed to it before
(openvino's ``opt_in_out --opt_in``). In a program that has imported openvino itself, nothing is changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TELEMETRY = "RAINFUSION_OPENVINO_TELEMETRY"
_PACKAGE = "openvino_telemetry"


def telemetry_is_wanted() -> bool:
    """Whether the user turned openvino's telemetry on: by the variable, which goes first, or by openvino's file."""
    asked = os.environ.get(TELEMETRY, "").strip().lower()
    if asked:
        return asked in ("1", "true", "yes", "on")
    try:
        home = Path(os.environ["LOCALAPPDATA"]) if os.name == "nt" else Path.home()
        folder = "Intel Corporation" if os.name == "nt" else "intel"
        return (home / folder / _PACKAGE).read_text(encoding="utf-8").strip() == "1"
    except (OSError, KeyError, ValueError, RuntimeError):
        return False


@contextmanager
def quietly() -> Iterator[None]:
    """openvino, imported in here for the first time, finds no telemetry package; afterwards others can import it."""
    if _PACKAGE in sys.modules or "openvino" in sys.modules or telemetry_is_wanted():
        yield
        return
    sys.modules[_PACKAGE] = None  # type: ignore[assignment]  # how Python writes that an import fails
    try:
        yield
    finally:
        sys.modules.pop(_PACKAGE, None)


with quietly():
    import openvino as ov
    from openvino import opset13 as op

__all__ = ["op", "ov"]
