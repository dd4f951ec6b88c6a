"""Operators by name: whether they are registered, in the form that is known, and in the CANN that is installed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from rainfusion.core.errors import BackendUnavailableError

# How torch_npu and MindIE-SD say, at the first call, that the installed CANN has no such function.
_NO_SYMBOL = "not in libopapi.so"

_lacking: dict[str, str] = {}


class LacksSymbolError(BackendUnavailableError):
    """The operator is registered, but the installed CANN does not have the function behind it."""


def trouble(operator: str, keywords: frozenset[str]) -> str:
    """Why ``namespace::name`` cannot be called with these keywords; empty where nothing is known against it."""
    if operator in _lacking:
        return _lacking[operator]
    found = _operator(operator)
    if found is None:
        return _why_absent(operator)
    takes = {argument.name for argument in found._schema.arguments}
    unknown = sorted(keywords - takes)
    return f"the one installed has another form, without {', '.join(unknown)}" if unknown else ""


def call(operator: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Call ``namespace::name``.

    Raises:
        LacksSymbolError: this CANN does not have it; remembered, so that `trouble` says so from now on.
    """
    try:
        returned: tuple[Any, ...] = _operator(operator)(**arguments)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        if _NO_SYMBOL not in said:
            raise
        _lacking[operator] = f"the installed CANN lacks it ({said})"
        raise LacksSymbolError(f"{operator}: {_lacking[operator]}", "install a newer CANN") from error
    return returned


def _operator(operator: str) -> Any:
    namespace, name = operator.split("::")
    registered = getattr(torch.ops, namespace)
    if namespace == "mindiesd" and not hasattr(registered, name):
        _mindiesd_trouble()
    return getattr(getattr(registered, name, None), "default", None)


def _why_absent(operator: str) -> str:
    if operator.startswith("mindiesd::"):
        return _mindiesd_trouble() or "this MindIE-SD does not have it"
    return "this torch_npu does not have it"


@cache
def _mindiesd_trouble() -> str:
    """Import MindIE-SD, which registers its operators; why that failed, or empty."""
    if find_spec("mindiesd") is None:
        return "MindIE-SD is not installed"
    try:
        import_module("mindiesd")
    except (Exception, SystemExit) as error:  # a vendor's stack raises errors of any kind
        return f"importing mindiesd failed: {type(error).__name__}: {error}".partition("\n")[0]
    return ""
