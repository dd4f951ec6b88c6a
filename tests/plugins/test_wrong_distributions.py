"""Distributions that are wrong: calls go on, and `rainfusion devices` says who is wrong and why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from typing import Any

import pytest

CALL = """
    import time
    import numpy, rainfusion, rainfusion.dispatch
    from rainfusion.backends import reference
    x = numpy.ones((1, 1, 9, 8), "float32")
    start = time.monotonic()
    right = rainfusion.attention(x, x, x, sparsity=0).tolist() == x.tolist()
    rows = [[r.backend, r.status, r.reason] for r in rainfusion.devices(isolate=False)]
    answer = [right, time.monotonic() - start, rows]
"""
ANNOUNCE = "from rainfusion import BackendSpec, hookimpl\n@hookimpl\ndef rainfusion_backends():\n    "
BACKEND = """
import os, sys, time, ctypes
from rainfusion import Backend, Capabilities, Device
class B(Backend):
    name = "vendor"
    def devices(self):
        {devices}
        return [Device("chip")]
    def device_of(self, array): return None
    def capabilities(self, device): return Capabilities()
"""
# Source of a plugin, what is said of it.
PLUGINS = {
    "BaseException at import": ("raise BaseException('no')", "BaseException: no"),
    "KeyboardInterrupt at import": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "GeneratorExit at import": ("raise GeneratorExit", "GeneratorExit"),
    "sys.exit at import": ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    "sleep at import": ("import time; time.sleep(60)", "it has not announced its backends yet"),
    "sleep in the hook": (f"{ANNOUNCE}import time; time.sleep(60)", "it has not announced its backends yet"),
    "BaseException in the hook": (f"{ANNOUNCE}raise BaseException('no')", "BaseException: no"),
    "KeyboardInterrupt in the hook": (f"{ANNOUNCE}raise KeyboardInterrupt", "KeyboardInterrupt"),
    "None": (f"{ANNOUNCE}return None", "rainfusion_backends gave None"),
    "text": (f"{ANNOUNCE}return 'acme'", "rainfusion_backends gave 'acme'"),
    "a number": (f"{ANNOUNCE}return 7", "rainfusion_backends gave 7"),
    "a spec alone": (f"{ANNOUNCE}return BackendSpec('x', 'm:X')", "rainfusion_backends gave BackendSpec"),
    "a dict": (f"{ANNOUNCE}return {{'x': 'm:X'}}", "rainfusion_backends gave {'x'"),
    "without end": (
        f"{ANNOUNCE}\n    while True:\n        yield BackendSpec('x', 'm:X')",
        "rainfusion_backends gave more than 256",
    ),
    "a name of control characters": (
        f"{ANNOUNCE}return [BackendSpec('\\x1b[31m\\nx', 'm:X')]",
        "give text that can be printed",
    ),
    "calls rainfusion": (
        "import rainfusion, numpy\nx = numpy.ones((1, 1, 9, 8), 'f4')\nrainfusion.attention(x, x, x, backend='nobody')",
        "",
    ),
    "markup": ("raise OSError('[/red] [bold] \\x1b[31m \\x07')", "[/red] [bold] \\x1b[31m \\x07"),
}
ENTRY_POINTS = {
    "a line without a value": "[console_scripts]\noops\n",
    "a broken line of ours": "[rainfusion]\noops\n",
    "no target": "[rainfusion]\nx =\n",
    "junk target": "[rainfusion]\nx = !!! not: a target !!!\n",
    "no header": "x = y\n",
    "twice": "[rainfusion]\nx = no_such_module\nx = no_such_module\n",
    "markup in the name": "[rainfusion]\n[bold]x[/] = no_such_module\n",
    "control characters": "[rainfusion]\nx\x1b[31m = no_such_module\n",
}


@pytest.mark.parametrize("kind", PLUGINS)
def test_a_wrong_plugin_costs_nobody_a_call(site: Any, kind: str) -> None:
    source, reason = PLUGINS[kind]
    site.add("aaa-wrong", {"wrong": "wrong_plugin"}, {"wrong_plugin.py": source})
    patience = {"RAINFUSION_PLUGIN_SECONDS": "0.5"} if "sleep" in kind or "calls" in kind else {}
    warnings = "import warnings; warnings.simplefilter('ignore')\n"
    right, seconds, rows = site.ask(warnings + "\n".join(line[4:] for line in CALL.splitlines()), **patience)
    assert right
    assert seconds < 10  # on a busy machine; the sleeps take far longer
    (said,) = (said for name, status, said in rows if name == "wrong" and status == "unavailable")
    assert "plugin wrong (aaa-wrong): " in said
    assert reason in said


@pytest.mark.parametrize("kind", ENTRY_POINTS)
def test_broken_metadata_costs_nobody_a_call(site: Any, kind: str) -> None:
    site.add("aaa-wrong", {})
    (site.folder / "aaa_wrong-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS[kind])
    right, _, rows = site.ask(CALL)
    assert right
    known = {"reference", "torch", "triton", "torch_npu", "openvino"}
    strange = [row for row in rows if row[0] not in known]
    assert all("aaa-wrong" in said for _, _, said in strange)
    assert all(text.isprintable() for row in strange for text in row)
    assert strange or kind == "no header"


@pytest.mark.parametrize("metadata", ["", "Version: 1.0\n", "\xff\xfe", "Name: \n\n"])
def test_metadata_without_a_name_costs_nobody_a_call(site: Any, metadata: str) -> None:
    site.add("aaa-wrong", {"wrong": "no_such_module"})
    (site.folder / "aaa_wrong-1.0.dist-info" / "METADATA").write_bytes(metadata.encode("latin-1"))
    right, _, rows = site.ask(CALL)
    assert right
    assert any("aaa_wrong" in said for _, _, said in rows)


def installed(site: Any, devices: str, announce: str = "return [BackendSpec('vendor', 'vendor_backend:B')]") -> None:
    site.add("vendor", {"vendor": "vendor_plugin"}, {"vendor_plugin.py": ANNOUNCE + announce})
    (site.folder / "vendor_backend.py").write_text(BACKEND.format(devices=devices))


COMMAND = ("-m", "rainfusion.cli", "devices", "--json")
OFF = {"RAINFUSION_DISABLED_PLUGINS": "torch,triton,torch_npu,openvino"}


@pytest.mark.parametrize(
    ("devices", "announce", "reason"),
    [
        ("ctypes.string_at(0)", None, "the probing process ended with status -11"),
        ("time.sleep(600)", None, "no answer within 8 s"),
        ("time.sleep(600)", "print('[]'); return [BackendSpec('vendor', 'vendor_backend:B')]", "no answer within 8 s"),
        ("pass", "import ctypes; ctypes.string_at(0)", "the probing process ended with status -11"),
        ("pass", "import time; time.sleep(600)", "no answer within 8 s"),
        ("raise KeyboardInterrupt", None, "KeyboardInterrupt"),
        ("return [1]", None, "devices() of backend 'vendor' gave 1"),
        ("return 'chip'", None, "devices() of backend 'vendor' gave 'chip'"),
        ("print('rainfusion devices: []'); os._exit(0)", None, "the probing process ended with status 0"),
        ("raise OSError('[/bold] \\x1b[2J')", None, "OSError: [/bold] \\x1b[2J"),
        ("return [Device('[/bold]x', 0, '[red]')]", None, ""),
    ],
)
def test_the_command_lists_what_ends_or_hangs_the_interpreter(
    site: Any, devices: str, announce: str | None, reason: str
) -> None:
    installed(site, devices, *([announce] if announce else []))
    done = site.start(*COMMAND, RAINFUSION_PROBE_SECONDS="8", **OFF)
    assert done.returncode == 0, done.stderr
    rows = {row["backend"]: row for row in json.loads(done.stdout)}
    assert reason in rows["vendor"]["reason"]
    assert rows["reference"]["status"] == "ready"


@pytest.mark.parametrize(
    "devices", ["raise OSError('[/bold] \\x1b[2J \\\\')", "return [Device('[/bold]x', 0, '[red]')]"]
)
def test_the_table_takes_no_words_for_markup(site: Any, devices: str) -> None:
    installed(site, devices)
    done = site.start(*COMMAND[:-1], **OFF)
    assert done.returncode == 0, done.stderr
    assert "[/bold]" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_the_first_interrupt_ends_the_command(site: Any) -> None:
    installed(site, "open('started', 'w').close(); time.sleep(600)")
    path = os.pathsep.join(filter(None, [str(site.folder), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, **OFF, "PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, *COMMAND],
        env=environ,
        cwd=site.folder,
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs ignore it
    )
    try:
        while not (site.folder / "started").exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
    finally:
        process.kill()
        process.wait()
