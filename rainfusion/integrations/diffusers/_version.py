"""Which diffusers this can work with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from rainfusion.core.errors import BackendUnavailableError

OLDEST = (0, 36)
TESTED = "0.42.1"


def check_version() -> None:
    """Raises BackendUnavailableError where diffusers is missing or too old."""
    try:
        found = version("diffusers")
    except PackageNotFoundError:
        raise BackendUnavailableError("diffusers is not installed", "pip install 'rainfusion[diffusers]'") from None
    if tuple(int(part) for part in found.split(".")[:2] if part.isdigit()) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise BackendUnavailableError(
            f"diffusers {found} has no registry of attention backends that rainfusion can use; {TESTED} was tested",
            f"pip install 'diffusers>={oldest}'",
        )
