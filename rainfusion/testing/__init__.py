"""The conformance kit and parity: what a backend did on shared cases, observed, judged and compared.

    # conftest.py
    pytest_plugins = ["rainfusion.testing.pytest_plugin"]

    # test_acme.py
    class TestAcme(ConformanceSuite):
        backend = "acme"

Importing this package imports neither NumPy nor pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rainfusion.testing.cases import Case as Case
    from rainfusion.testing.suite import ConformanceSuite as ConformanceSuite

_HOMES = {"Case": "cases", "ConformanceSuite": "suite"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
