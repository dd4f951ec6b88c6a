"""Law 8: importing loads nothing, neither here nor in other people's pytest."""

from __future__ import annotations

from typing import Any

import pytest

VENDORS = {"torch", "triton", "torch_npu", "openvino"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("rainfusion", {*VENDORS, "numpy", "array_api_compat", "pluggy"}),
        ("rainfusion.testing", {*VENDORS, "numpy", "pytest"}),
        ("rainfusion.testing.pytest_plugin", VENDORS),
        ("rainfusion.testing.observe", {*VENDORS, "pytest"}),
        ("rainfusion.functional", VENDORS),
        ("rainfusion.dispatch", VENDORS),
        ("rainfusion.core.passes", VENDORS),
    ],
)
def test_importing_a_module_does_not_load(site: Any, module: str, absent: set[str]) -> None:
    loaded = site.ask(f"import sys\nimport {module}\nanswer = [*sys.modules]")
    assert module in loaded
    assert not absent & {*loaded}


CHOOSE = """
    import sys
    from importlib.util import find_spec
    import numpy
    import rainfusion
    from rainfusion.plugins.manager import host

    class Tensor:
        shape, dtype = (1, 1, 9, 8), "float32"
        def __init__(self, device): self.device = type("Device", (), {"type": device})
    Tensor.__module__ = "torch"

    problem = rainfusion.AttentionProblem(1, 1, 9, 9, 8)
    plan = rainfusion.plan(problem, policy=rainfusion.TopK(0))
    refused = {}
    try:
        refused = {r.backend: r.reason for r in rainfusion.choose(plan, like=LIKE).refusals}
    except rainfusion.NoBackendError:
        _, refusals = host().backends(LIKE)
        refused = {r.backend: r.reason for r in refusals}
    prefix = "rainfusion.backends."
    modules = [m.removeprefix(prefix) for m in sys.modules if m.startswith(prefix)]
    backends = {m.partition(".")[0] for m in modules if "." in m or m == "reference"}
    vendors = [m for m in ("torch", "triton", "torch_npu", "openvino") if m in sys.modules]
    answer = [sorted(backends), vendors, refused]
"""


@pytest.mark.parametrize(
    ("like", "kind", "out", "without"),
    [
        ("numpy.zeros((1, 1, 9, 8), 'float32')", "numpy", {"triton", "torch_npu"}, "torch,openvino"),
        ("Tensor('cuda')", "torch:cuda", {"openvino", "torch_npu", "reference"}, "torch,triton"),
        ("Tensor('npu')", "torch:npu", {"openvino", "triton", "reference"}, "torch,torch_npu"),
        ("Tensor('cpu')", "torch:cpu", {"triton", "torch_npu"}, "torch,openvino"),
    ],
    ids=["numpy", "cuda", "npu", "cpu"],
)
def test_choosing_imports_only_backends_that_can_own_the_array(
    site: Any, like: str, kind: str, out: set[str], without: str
) -> None:
    code = CHOOSE.replace("LIKE", like)
    backends, vendors, refused = site.ask(code, RAINFUSION_DISABLED_PLUGINS=without)
    assert not out & {*backends}
    assert not {*vendors} & {*out, *without.split(",")}
    for name in out:
        assert refused[name].endswith(f"arrays; this is {kind}")


def test_one_that_announces_no_arrays_is_asked_about_all(site: Any, plugin: Any) -> None:
    site.add("any", {"any": "any_plugin"}, {"any_plugin.py": plugin(any="any_backend:Any")})
    (site.folder / "any_backend.py").write_text("raise OSError('asked')\n")
    _, _, refused = site.ask(CHOOSE.replace("LIKE", "numpy.zeros((1, 1, 9, 8), 'float32')"))
    assert refused["any"] == "backend 'any' does not load: OSError: asked"


def test_another_projects_pytest_stays_light(site: Any) -> None:
    test = "import sys\ndef test_light():\n    assert not {'numpy', 'torch', 'rainfusion.core'} & {*sys.modules}\n"
    (site.folder / "test_light.py").write_text(test)
    done = site.start("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "test_light.py")
    assert done.returncode == 0, done.stdout
