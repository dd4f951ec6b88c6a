"""Every error rainfusion raises on purpose; each message says what was given, what is allowed, what to do next."""

from __future__ import annotations

import sys
import warnings
from typing import Any

FAILURES = (Exception, SystemExit, GeneratorExit)
"""What counts as a failure of a plugin or a driver: some call `sys.exit`, which must not end the program."""


class RainfusionError(Exception):
    """Root of all rainfusion errors."""


class ProblemError(RainfusionError, ValueError):
    """Tensors or arguments that do not form an attention problem (shapes, dtypes, devices, scale)."""


class LayoutError(RainfusionError, ValueError):
    """A grid, text length, window or block size that describes no token layout."""


class PolicyError(RainfusionError, ValueError):
    """A selection policy out of its range (sparsity, mass, floor)."""


class MaskError(RainfusionError, ValueError):
    """A block mask that is malformed (indices out of range, another shape), on another device or of another problem."""


class PlanFormatError(RainfusionError, ValueError):
    """A plan of another version, or operations that are unknown or do not fit the values they read."""


class BackendError(RainfusionError, RuntimeError):
    """Something about a backend: unknown, unavailable, duplicated, or unable to run the plan."""


class UnknownBackendError(BackendError, LookupError):
    """A backend name that no plugin has announced."""


class DuplicateBackendError(BackendError):
    """Two plugins claim one backend name."""


class BackendUnavailableError(BackendError):
    """A backend that is known but cannot be loaded here, or has no device here.

    Args:
        reason: what is missing or failed.
        install: what to type to get it.
    """

    def __init__(self, reason: str, install: str = "") -> None:
        super().__init__(f"{reason}; {install}" if install else reason)
        self.reason, self.install = reason, install


class NoBackendError(BackendError):
    """No backend takes these tensors and this plan; the message is the table of refusals."""


class LoweringError(BackendError):
    """A backend declines operations of a plan. Kernels raise it from `build` with the reason."""


class RainfusionWarning(UserWarning):
    """Root of all rainfusion warnings."""


class SparsityWarning(RainfusionWarning):
    """A sparsity that cannot be realised, or one whose budget protection takes; the message says what helps."""


class SpeedWarning(RainfusionWarning):
    """Skipping blocks, or attention in 8 bits, is slower than doing without; the message says why."""


def warn_caller(message: str, category: type[RainfusionWarning]) -> None:
    """Warn at the line outside this package that led here, however deep the call."""
    depth = 1
    while sys._getframe(depth).f_globals.get("__name__", "").partition(".")[0] == "rainfusion":
        depth += 1
    warnings.warn(message, category, stacklevel=depth + 1)


def said(error: BaseException) -> str:
    """An error's type and the first line of its message, readable whatever the error is."""
    try:
        first_line = str(error).strip().partition("\n")[0]
    except BaseException:  # code of the error's class
        first_line = "(its message cannot be read)"
    return f"{type(error).__name__}: {readable(first_line)}"


def readable(text: Any, most: int = 400) -> str:
    """Somebody else's text on one line, cut, and without control characters, which would act on a terminal."""
    try:
        text = " ".join(str.split(text if isinstance(text, str) else str(text)))
    except BaseException:  # code of the value's class
        text = f"<{type(text).__name__}>"
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
