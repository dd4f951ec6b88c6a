"""Plugins are found by entry point, one by one, and none can take the others along."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from rainfusion.plugins import manager
from rainfusion.plugins.manager import PluginHost

ROWS = """
    import rainfusion
    answer = [[r.backend, r.status, r.stage, r.reason] for r in rainfusion.devices(isolate=False)]
"""
NAMES = "from rainfusion.plugins.manager import host\nanswer = list(host().names)"

FLOATS = """
    import numpy as np
    from rainfusion import Backend, Capabilities, Device

    class Floats(Backend):
        name = "floats"
        def devices(self): return [Device("floats")]
        def device_of(self, array): return None
        def capabilities(self, device): return Capabilities()
"""


def failures(rows: list[list[str]]) -> dict[str, tuple[str, str]]:
    return {backend: (stage, reason) for backend, status, stage, reason in rows if status != "ready"}


def ready(rows: list[list[str]]) -> set[str]:
    return {backend for backend, status, *_ in rows if status == "ready"}


def test_nothing_is_known_that_no_distribution_declares(site: Any) -> None:
    assert "acme" not in site.ask(NAMES)
    site.add_demo()
    assert "acme" in site.ask(NAMES)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('driver too old')", "RuntimeError: driver too old"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError: invalid syntax"),
    ],
    ids=["import", "raise", "exit", "syntax"],
)
def test_a_plugin_that_does_not_load_is_one_row(site: Any, source: str, reason: str) -> None:
    site.add_demo()
    site.add("aaa-broken", {"broken": "broken_plugin"}, {"broken_plugin.py": source})
    rows = site.ask(ROWS)
    stage, said = failures(rows)["broken"]
    assert (stage, said[: len("plugin broken (aaa-broken): ") + len(reason)]) == (
        "load",
        f"plugin broken (aaa-broken): {reason}",
    )
    assert {"acme", "reference"} <= ready(rows)


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        ("def rainfusion_backends(): return ['acme']", "BackendError: rainfusion_backends yields 'acme'"),
        ("def rainfusion_backends(): return [BackendSpec('x', 'no colon')]", "BackendError: BackendSpec(name='x'"),
        (
            "def rainfusion_backends(): return [BackendSpec('x', 'm:X', arrays='numpy')]",
            "backend 'x' has arrays='numpy'; give a tuple such as ('torch:cuda',)",
        ),
        ("def rainfusion_backends(): return [BackendSpec('x', 'm:X', api='1')]", "has api='1'; give a whole number"),
        ("def rainfusion_backends(): return [BackendSpec(7, 'm:X')]", "backend 7 has name=7; give text"),
        ("def rainfusion_backends(): raise KeyError('chip')", "KeyError: 'chip'"),
        ("def rainfusion_backends(device): return []", "PluginValidationError"),
        ("def rainfusion_backend(): return []", "PluginValidationError"),
    ],
    ids=[
        "no spec",
        "no target",
        "text for arrays",
        "text for api",
        "number for a name",
        "raises",
        "wrong argument",
        "misspelt",
    ],
)
def test_a_hook_that_misbehaves_is_one_row(site: Any, hook: str, reason: str) -> None:
    source = f"from rainfusion import BackendSpec, hookimpl\n@hookimpl\n{hook}\n"
    site.add("aaa-broken", {"broken": "broken_plugin"}, {"broken_plugin.py": source})
    rows = site.ask(ROWS)
    assert reason in failures(rows)["broken"][1]
    assert "reference" in ready(rows)


@pytest.mark.parametrize(
    ("source", "stage", "reason"),
    [
        ("import sys; sys.exit(1)", "load", "SystemExit: 1"),
        ("import no_such_driver", "load", "No module named 'no_such_driver'"),
        ("Wrong = dict", "load", "is not a Backend with name 'wrong'"),
        (
            "from rainfusion import Backend\nclass Wrong(Backend):\n name = 'wrong'\n"
            " def devices(self): raise OSError('no driver')\n def device_of(self, a): raise OSError('no driver')\n"
            " def capabilities(self, d): ...",
            "probe",
            "OSError: no driver",
        ),
        (
            "from rainfusion import Backend\nclass Wrong(Backend):\n name = 'wrong'\n def devices(self): return []\n"
            " def device_of(self, a): return None\n def capabilities(self, d): ...",
            "probe",
            "no device of this kind here",
        ),
    ],
    ids=["exits", "does not import", "is no backend", "cannot probe", "no device"],
)
def test_a_backend_that_is_not_available_is_one_row_and_does_not_disturb_a_call(
    site: Any, plugin: Any, source: str, stage: str, reason: str
) -> None:
    site.add("wrong", {"wrong": "wrong_plugin"}, {"wrong_plugin.py": plugin(wrong="wrong_backend:Wrong")})
    (site.folder / "wrong_backend.py").write_text(source)
    rows = site.ask(ROWS)
    assert failures(rows)["wrong"][0] == stage
    assert reason in failures(rows)["wrong"][1]
    call = "import numpy, rainfusion\nx = numpy.ones((1, 1, 9, 8), 'float32')\n"
    assert site.ask(call + "answer = rainfusion.attention(x, x, x, sparsity=0).tolist() == x.tolist()")


def test_a_backend_of_another_interface_is_refused_with_a_sentence(site: Any) -> None:
    source = """
        from rainfusion import BackendSpec, hookimpl

        @hookimpl
        def rainfusion_backends():
            yield BackendSpec("later", "no_such_module:Later", api=2)
    """
    site.add("later", {"later": "later_plugin"}, {"later_plugin.py": source})
    rows = site.ask(ROWS)
    assert failures(rows)["later"] == (
        "load",
        "backend 'later' was written for interface 2; this rainfusion has 1",
    )
    assert "reference" in ready(rows)
    asked = """
        import numpy, rainfusion
        x = numpy.ones((1, 1, 9, 8), 'float32')
        try:
            rainfusion.attention(x, x, x, backend="later")
        except rainfusion.BackendUnavailableError as error:
            answer = str(error)
    """
    assert site.ask(asked).endswith("this rainfusion has 1; install versions of both that go together")


def test_requirements_are_looked_up_not_imported(site: Any) -> None:
    source = """
        from rainfusion import BackendSpec, hookimpl

        @hookimpl
        def rainfusion_backends():
            yield BackendSpec("needy", "needy:Needy", requires=("no_such_stack",), install="pip install no-such-stack")
    """
    site.add("needy", {"needy": "needy_plugin"}, {"needy_plugin.py": source})
    rows = site.ask(ROWS.replace("r.reason", "r.install + ': ' + r.reason"))
    stage, said = failures(rows)["needy"]
    assert stage == "load"
    assert said.startswith("pip install no-such-stack: backend 'needy' needs no_such_stack, not installed")


def test_a_package_that_failed_to_import_is_not_imported_again(site: Any, plugin: Any) -> None:
    (site.folder / "halfway").mkdir()
    start = "import os, halfway.part\nos.environ['HALFWAY'] = 'more'\nraise OSError('no driver')\n"
    (site.folder / "halfway" / "__init__.py").write_text(start)
    (site.folder / "halfway" / "part.py").write_text("print('imported')\n")
    (site.folder / "floats_backend.py").write_text("import halfway\n")
    code = """
        import contextlib, io, os
        from rainfusion import BackendSpec
        from rainfusion.core.errors import BackendUnavailableError
        from rainfusion.plugins.loading import load

        said, printed = [], io.StringIO()
        for name in ("first", "second"):
            try:
                with contextlib.redirect_stdout(printed):
                    load(BackendSpec(name, "floats_backend:Floats", requires=("halfway",)))
            except BackendUnavailableError as error:
                said.append(error.reason)
        answer = [*said, printed.getvalue(), os.environ["HALFWAY"]]
    """
    assert site.ask(code, HALFWAY="as it was") == [
        "backend 'first' does not load: OSError: no driver",
        "backend 'second' needs halfway: OSError: no driver",
        "imported\n",
        "as it was",
    ]


def test_two_claims_to_a_name_are_an_error_when_it_is_used(site: Any, plugin: Any) -> None:
    site.add_demo()
    site.add("acme-too", {"acme-too": "too_plugin"}, {"too_plugin.py": plugin(acme="elsewhere:Acme")})
    rows = site.ask(ROWS)
    reason = failures(rows)["acme"][1]
    assert "acme (acme-rainfusion) (acme_rainfusion.backend:AcmeBackend)" in reason
    assert "acme-too (acme-too) (elsewhere:Acme)" in reason
    assert "reference" in ready(rows)
    assert "acme" in ready(site.ask(ROWS, RAINFUSION_DISABLED_PLUGINS="torch,acme-too"))


def test_threads_that_ask_at_once_share_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "_host", cache(PluginHost))
    with ThreadPoolExecutor(8) as pool:
        hosts = list(pool.map(lambda _: manager.host(), range(8)))
    assert all(host is hosts[0] for host in hosts)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_a_backend_of_our_own_cannot_be_replaced(site: Any, plugin: Any, name: str) -> None:
    site.add("usurper", {"usurper": "usurper"}, {"usurper.py": plugin(**{name: "usurper_backend:Reference"})})
    rows = site.ask(ROWS, RAINFUSION_DISABLED_PLUGINS="triton,torch_npu,openvino")
    assert f"announces a backend '{name}', a name of rainfusion's own; choose another" in failures(rows)["usurper"][1]
    assert name in ready(rows)


@pytest.mark.parametrize(
    ("switches", "known"),
    [
        (("", ""), {"acme", "torch", "reference"}),
        (("builtin", ""), {"torch", "reference"}),
        (("acme", ""), {"acme", "reference"}),
        (("builtin, acme", ""), {"acme", "torch", "reference"}),
        (("", "acme"), {"torch", "reference"}),
        (("acme", "acme"), {"reference"}),
    ],
)
def test_plugins_are_switched_by_environment(demo: Any, switches: tuple[str, str], known: set[str]) -> None:
    environ = dict(zip(("RAINFUSION_PLUGINS", "RAINFUSION_DISABLED_PLUGINS"), switches, strict=True))
    assert {*demo.ask(NAMES, **environ)} & {"acme", "torch", "reference"} == known


def test_a_plugin_that_is_off_is_not_imported_and_says_so(demo: Any) -> None:
    code = NAMES.replace("answer = list(host().names)", "host()\nimport sys\nanswer = 'acme_rainfusion' in sys.modules")
    assert demo.ask(code)
    assert not demo.ask(code, RAINFUSION_DISABLED_PLUGINS="acme")
    rows = demo.ask(ROWS, RAINFUSION_DISABLED_PLUGINS="torch,acme")
    assert failures(rows)["acme"][0] == "disabled"
    asked = "import rainfusion\ntry:\n rainfusion.use('acme').__enter__()\nexcept LookupError as e:\n answer = str(e)"
    assert "switched off by RAINFUSION_PLUGINS or" in demo.ask(asked, RAINFUSION_DISABLED_PLUGINS="acme")


def test_announcing_imports_no_backend(demo: Any) -> None:
    code = "from rainfusion.plugins.manager import host\nhost()\nimport sys\nanswer = [*sys.modules]"
    loaded = {*demo.ask(code)}
    assert "acme_rainfusion" in loaded
    assert not {"acme_rainfusion.backend", "torch", "triton", "torch_npu", "openvino"} & loaded


def test_a_host_without_plugins_has_the_reference() -> None:
    bare = PluginHost({}, found=[])
    assert bare.names == ("reference",)
    assert bare.backend("reference").name == "reference"
