"""The models that are known, a file for each family: adapters by the name of the model class."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules


@cache
def load() -> None:
    """Register the adapters of every file here."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
