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
    ],
)
def test_importing_a_module_does_not_load(site: Any, module: str, absent: set[str]) -> None:
    loaded = site.ask(f"import sys\nimport {module}\nanswer = [*sys.modules]")
    assert module in loaded
    assert not absent & {*loaded}


def test_another_projects_pytest_stays_light(site: Any) -> None:
    test = "import sys\ndef test_light():\n    assert not {'numpy', 'torch', 'rainfusion.core'} & {*sys.modules}\n"
    (site.folder / "test_light.py").write_text(test)
    done = site.start("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "test_light.py")
    assert done.returncode == 0, done.stdout
