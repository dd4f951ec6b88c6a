"""Tuning the plain attention kernel on the device at hand, where ``RAINFUSION_TRITON_AUTOTUNE=1`` asks for it.

It takes a compilation and a fraction of a second for each setting, at the first call of a lowered plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from triton.compiler.errors import CompilationError
from triton.runtime import errors
from triton.testing import do_bench

from rainfusion.backends.triton.configs import AttendConfig

ASKED = "RAINFUSION_TRITON_AUTOTUNE"
does_not_compile: tuple[type[Exception], ...] = (
    CompilationError,
    getattr(errors, "PTXASError", CompilationError),  # from Triton 3.3 on
)
"""What Triton raises where it cannot compile a kernel."""


def is_asked() -> bool:
    """Whether the environment asks for tuning."""
    return os.environ.get(ASKED, "") not in ("", "0")


def fastest_first(configs: Iterable[AttendConfig], launch: Callable[[AttendConfig], None]) -> list[AttendConfig]:
    """The settings that compile and that the device can hold, by median time of `launch`; none where none does."""
    times: dict[AttendConfig, float] = {}
    for config in configs:
        try:
            times[config] = do_bench(lambda config=config: launch(config), return_mode="median")
        except (errors.OutOfResources, *does_not_compile):
            continue
    return sorted(times, key=times.__getitem__)
