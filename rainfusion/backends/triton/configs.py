"""Launch settings of the plain attention kernel: measured where this says so, safe elsewhere.

Nothing is tuned at run time unless that is asked for (`tune`): a first call takes as long as compiling one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from rainfusion.backends.triton.chip import INTERPRETED


@dataclass(frozen=True)
class AttendConfig:
    """How the plain kernel is cut and launched.

    Attributes:
        rows: query rows a program holds; keys: keys it takes a step. Powers of two.
        warps, stages: Triton's.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    def fitting(self, block: tuple[int, int]) -> tuple[int, int]:
        """Rows and keys for blocks that may be smaller; Triton's products need 16 of either."""
        q_block, kv_block = (max(triton.next_power_of_2(size), 16) for size in block)
        return min(self.rows, q_block), min(self.keys, kv_block)


# The best of those tried on an H100 at 80 % skipped, by bytes a channel and head dim up to which they serve.
_MEASURED = {
    (2, 64): AttendConfig(128, 64, 4, 3),
    (2, 128): AttendConfig(128, 128, 8, 3),
    (4, 128): AttendConfig(128, 32, 8, 2),
}
# Ever smaller ones, for head dims and devices of which nothing is known but that kernels must fit.
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
        for (size, widest), measured in _MEASURED.items():
            if size == itemsize and head_dim <= widest:
                return (measured, *_SAFE)
    return _SAFE
