"""Importing OpenVINO's backend leaves no trace of openvino's telemetry, unless the user turned it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino")

# A stand-in for the package openvino_telemetry, which says that it was asked and sends nothing.
STUB = """
class Telemetry:
    asked = []
    def __init__(self, *args, **kwargs): Telemetry.asked.append("made")
    def send_event(self, *args, **kwargs): Telemetry.asked.append("send_event")
"""
CODE = """
    import sys, warnings
    warnings.simplefilter("ignore")
    FIRST
    from rainfusion.backends.openvino import runtime
    import openvino_telemetry
    answer = [bool(openvino_telemetry.Telemetry.asked), runtime.found_devices()[0].type]
"""


@pytest.mark.parametrize(
    ("first", "variable", "consent", "on"),
    [
        ("pass", "", None, False),
        ("pass", "", "0", False),
        ("pass", "", "1", True),
        ("pass", "0", "1", False),
        ("pass", "1", None, True),
        ("import openvino", "", None, True),
    ],
)
def test_telemetry_is_off_unless_the_user_turned_it_on(
    site: Any, tmp_path: Path, first: str, variable: str, consent: str | None, on: bool
) -> None:
    package = site.folder / "openvino_telemetry"
    (package / "backend").mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    (package / "backend" / "__init__.py").write_text("backend_ga4 = None\n")
    home = tmp_path / "home"
    (home / "intel").mkdir(parents=True)
    if consent is not None:
        (home / "intel" / "openvino_telemetry").write_text(consent)
    environ = {"HOME": str(home), "RAINFUSION_OPENVINO_TELEMETRY": variable}
    asked, kind = site.ask(CODE.replace("FIRST", first), **environ)
    assert asked is on
    assert kind == "cpu"
    assert [path.name for path in home.rglob("*") if path.is_file()] == (["openvino_telemetry"] if consent else [])
