"""Launch settings of the plain attention kernel: measured ones, safe ones, and tuning on the device at hand.

Nothing is tuned unless ``RAINFUSION_TRITON_AUTOTUNE=1`` asks for it: a first call takes as long as compiling one
kernel. Tuning takes a compilation and a fraction of a second for each setting, at the first call of a lowered plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import triton
from triton.compiler.errors import CompilationError
from triton.runtime import errors
from triton.testing import do_bench

from rainfusion.backends.triton.hardware import INTERPRETED

VARIABLE = "RAINFUSION_TRITON_AUTOTUNE"
DOES_NOT_COMPILE: tuple[type[Exception], ...] = (
    CompilationError,
    getattr(errors, "PTXASError", CompilationError),  # from Triton 3.3 on
)
"""What Triton raises where it cannot compile a kernel."""


@dataclass(frozen=True)
class AttendConfig:
    """How the plain kernel is cut and launched.

    Attributes:
        rows: query rows a program holds; keys: keys it takes a step. Powers of two.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    def fitting(self, block: tuple[int, int]) -> tuple[int, int]:
        """Rows and keys for blocks that may be smaller; Triton's products need 16 of either."""
        q_block, kv_block = (max(triton.next_power_of_2(size), 16) for size in block)
        return min(self.rows, q_block), min(self.keys, kv_block)


# The best of those tried on an H100 at 80 % sparsity, by bytes a channel and the largest head dim they serve.
_MEASURED = {
    (2, 64): AttendConfig(128, 64, 4, 3),
    (2, 128): AttendConfig(128, 128, 8, 3),
    (4, 128): AttendConfig(128, 32, 8, 2),
}
# Ever smaller ones, for head dims and devices without measurements: the first that fits is used.
_SAFE = (
    AttendConfig(128, 64, 8, 2),
    AttendConfig(64, 32, 4, 2),
    AttendConfig(32, 32, 4, 1),
    AttendConfig(16, 16, 4, 1),
)
CANDIDATES = tuple(
    AttendConfig(rows, keys, warps, stages)
    for rows, keys, warps in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (128, 32, 8), (64, 64, 4), (64, 32, 4))
    for stages in (2, 3)
)
"""What tuning tries beside the settings above."""

_INTERPRETED = AttendConfig(128, 128, 4, 1)  # a step costs the same there, however much it holds


def attend_configs(itemsize: int, head_dim: int, architecture: str) -> tuple[AttendConfig, ...]:
    """Settings to try in order: the one to use, then smaller ones for devices that cannot hold it.

    Args:
        itemsize: bytes a channel, 2 or 4.
        architecture: such as ``"sm_90"``.
    """
    if architecture == INTERPRETED:
        return (_INTERPRETED,)
    if architecture == "sm_90":
        for (size, largest), measured in _MEASURED.items():
            if size == itemsize and head_dim <= largest:
                return (measured, *_SAFE)
    return _SAFE


def is_requested() -> bool:
    """Whether the environment asks for tuning."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def fastest_first(configs: Iterable[AttendConfig], launch: Callable[[AttendConfig], None]) -> list[AttendConfig]:
    """The settings that compile and that the device can hold, by median time of `launch`; empty where none does."""
    times: dict[AttendConfig, float] = {}
    for config in configs:
        try:
            times[config] = do_bench(lambda config=config: launch(config), return_mode="median")
        except (errors.OutOfResources, *DOES_NOT_COMPILE):
            continue
    return sorted(times, key=times.__getitem__)
