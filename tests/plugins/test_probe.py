"""Probing in a process of its own: what ends that process, or hangs about in it, costs one row."""

from __future__ import annotations

from typing import Any

import pytest

ROWS = """
    import rainfusion
    answer = [[r.backend, r.status, r.stage, r.reason] for r in rainfusion.devices()]
"""
BACKEND = """
    import atexit, os, sys
    from rainfusion import Backend, Capabilities, Device

    class Vendor(Backend):
        name = "vendor"
        def devices(self):
            {probe}
            return [Device("chip", 0, "a chip")]
        def device_of(self, array): return None
        def capabilities(self, device): return Capabilities()
"""


def probed(site: Any, plugin: Any, probe: str) -> dict[str, list[str]]:
    site.add("vendor", {"vendor": "vendor_plugin"}, {"vendor_plugin.py": plugin(True, vendor="vendor_backend:Vendor")})
    indented = probe.replace("\n", "\n" + " " * 12)
    site.add("vendor-backend", {}, {"vendor_backend.py": BACKEND.format(probe=indented)})
    return {backend: rest for backend, *rest in site.ask(ROWS)}


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("os._exit(7)", "the probing process ended with status 7"),
        ("os.abort()", "the probing process ended with status -6"),
        ("sys.exit('no licence')", "SystemExit: no licence"),
        ("raise OSError('no driver')", "OSError: no driver"),
        ("from rainfusion.core.errors import BackendUnavailableError as E; raise E('too old', 'update')", "too old"),
        ("import ctypes; ctypes.string_at(0)", "the probing process ended with status -11"),
    ],
)
def test_a_stack_that_ends_the_interpreter_is_one_row(site: Any, plugin: Any, probe: str, reason: str) -> None:
    rows = probed(site, plugin, probe)
    status, stage, said = rows["vendor"]
    assert (status, stage) == ("unavailable", "probe")
    assert reason in said
    assert rows["reference"][0] == "ready"


@pytest.mark.parametrize(
    "probe",
    [
        "pass",
        "print('vendor banner')",
        "os.write(1, b'banner without a newline')",
        "atexit.register(print, 'vendor says goodbye')",
        "atexit.register(os._exit, 9)",
    ],
)
def test_what_a_stack_prints_does_not_hide_its_devices(site: Any, plugin: Any, probe: str) -> None:
    assert probed(site, plugin, probe)["vendor"] == ["ready", "", ""]


def test_a_backend_announced_in_this_process_is_probed_in_it(site: Any) -> None:
    code = """
        import rainfusion
        rainfusion.register(rainfusion.BackendSpec("ours", "nowhere:Ours", requires=("json",), isolate=True))
        answer = [r.reason for r in rainfusion.devices(isolate=True) if r.backend == "ours"]
    """
    (reason,) = site.ask(code)
    assert "No module named 'nowhere'" in reason


def test_the_command_isolates_what_asks_for_it_though_it_requires_nothing(site: Any, plugin: Any) -> None:
    site.add("vendor", {"vendor": "vendor_plugin"}, {"vendor_plugin.py": plugin(True, vendor="vendor_backend:Vendor")})
    site.add("vendor-backend", {}, {"vendor_backend.py": BACKEND.format(probe="os._exit(7)")})
    rows = {backend: rest for backend, *rest in site.ask(ROWS.replace("devices()", "devices(isolate=True)"))}
    assert rows["vendor"][:2] == ["unavailable", "probe"]
    assert rows["reference"][0] == "ready"
