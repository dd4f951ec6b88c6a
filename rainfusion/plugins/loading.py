"""From the spec of a backend to the backend: checks of the spec, the import of its target, and what may go wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rainfusion.core.arrays import library_name
from rainfusion.core.backend import INTERFACE, Backend, BackendSpec
from rainfusion.core.checks import shown
from rainfusion.core.errors import BackendError, BackendUnavailableError, said

_broken: dict[str, str] = {}  # packages whose import failed half-way, and the error


def load(spec: BackendSpec) -> Backend:
    """Import a spec's target and make the backend.

    Raises:
        BackendUnavailableError: another interface version, something missing, or an import that failed; it says which.
    """
    if spec.api != INTERFACE:
        raise BackendUnavailableError(
            f"backend {spec.name!r} was written for interface {spec.api}; this rainfusion has {INTERFACE}",
            "install versions of both that go together",
        )
    environ = dict(os.environ)
    try:
        _check_requirements(spec)
        module, _, attribute = spec.target.partition(":")
        backend = getattr(import_module(module), attribute)()
        is_it = isinstance(backend, Backend) and _is_name(getattr(backend, "name", None), spec.name)
    except (BackendUnavailableError, KeyboardInterrupt):
        raise
    except BaseException as error:
        _restore(environ)
        _broken.update({name: said(error) for name in spec.requires if _is_half_imported(name)})
        raise BackendUnavailableError(f"backend {spec.name!r} does not load: {said(error)}", spec.install) from error
    if not is_it:
        raise BackendUnavailableError(f"{spec.target} is not a Backend with name {spec.name!r}", spec.install)
    made: Backend = backend
    return made


def _is_name(given: Any, name: str) -> bool:
    return isinstance(given, str) and str(given) == name


def _check_requirements(spec: BackendSpec) -> None:
    broken = next((name for name in spec.requires if _is_half_imported(name)), None)
    if broken:
        reason = _broken.get(broken, "its import failed in this process before")
        raise BackendUnavailableError(f"backend {spec.name!r} needs {broken}: {reason}", spec.install)
    missing = [name for name in spec.requires if find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(f"backend {spec.name!r} needs {', '.join(missing)}, not installed", spec.install)


def _is_half_imported(package: str) -> bool:
    """Whether an import of `package` failed and left modules behind; to import it again may end the interpreter."""
    return package not in sys.modules and any(name.startswith(f"{package}.") for name in [*sys.modules])


def _restore(environ: Mapping[str, str]) -> None:
    """Undo what a failed import has changed in the environment, which child processes inherit."""
    for key in {*os.environ} - {*environ}:
        del os.environ[key]
    os.environ.update({key: value for key, value in environ.items() if os.environ.get(key) != value})


def array_kind(x: Any) -> str:
    """The library of an array, and the type of its device where it says one: ``numpy``, ``torch:cuda``."""
    try:
        kind = getattr(getattr(x, "device", None), "type", None)
    except Exception:  # no array, and its attributes fail
        kind = None
    return f"{library_name(x)}:{kind}" if isinstance(kind, str) else library_name(x)


def owns(arrays: Sequence[str], kind: str) -> bool:
    """Whether a backend that announces `arrays` can own arrays of a kind; one that announces none can own any."""
    return not arrays or any(f"{kind}:".startswith(f"{owned}:") for owned in arrays)


def checked_spec(spec: Any) -> BackendSpec:
    """The spec itself.

    Raises:
        BackendError: it is not a well-formed spec; the message names the field and what it takes.
    """
    if type(spec) is not BackendSpec:
        raise BackendError(f"rainfusion_backends yields {shown(spec)}; give BackendSpec(name, 'package.module:Class')")
    for field, holds, wanted in (
        ("name", _is_text(spec.name) and spec.name.isprintable(), "text that can be printed"),
        ("target", _is_text(spec.target), "text, 'package.module:Class'"),
        ("requires", _are_texts(spec.requires), "a tuple of module names"),
        ("install", _is_text(spec.install), "text"),
        ("isolate", isinstance(spec.isolate, bool), "True or False"),
        ("revision", _is_integer(spec.revision), "a whole number"),
        ("arrays", _are_texts(spec.arrays), "a tuple such as ('torch:cuda',)"),
        ("api", _is_integer(spec.api), "a whole number"),
    ):
        if not holds:
            raise BackendError(f"backend {shown(spec.name)} has {field}={shown(getattr(spec, field))}; give {wanted}")
    module, colon, attribute = spec.target.partition(":")
    if not spec.name or not module or not colon or not attribute:
        raise BackendError(f"{shown(spec)} is incomplete; give a name and a target 'package.module:Class'")
    return spec


def _is_text(value: Any) -> bool:
    return type(value) is str  # a subclass may compare and hash as it likes


def _are_texts(value: Any) -> bool:
    return type(value) in (tuple, list) and all(_is_text(item) and item for item in value)


def _is_integer(value: Any) -> bool:
    return type(value) is int
