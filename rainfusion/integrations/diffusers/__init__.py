"""rainfusion in diffusers: one call makes the self-attention of a pipeline sparse.

handle = apply_rainfusion(pipe, RainFusionConfig(sparsity=0.8, dense_steps=(10, 0)))
pipe(prompt)
print(handle.report())
handle.remove()
"""

from __future__ import annotations

from rainfusion.integrations.calibration import Calibration
from rainfusion.integrations.config import ConfigError, RainFusionConfig
from rainfusion.integrations.diffusers._version import check_version

check_version()

from rainfusion.core.parts import Grid, Text, Tokens  # noqa: E402
from rainfusion.integrations.diffusers.adapter import (  # noqa: E402
    REST,
    Adapter,
    Hoist,
    Order,
    UnknownModelError,
    register_adapter,
)
from rainfusion.integrations.diffusers.apply import Handle, apply_rainfusion, remove_rainfusion  # noqa: E402
from rainfusion.integrations.diffusers.calibrate import calibrate  # noqa: E402
from rainfusion.integrations.diffusers.drift import measure_drift  # noqa: E402
from rainfusion.integrations.drift_table import DriftRow, drift_threshold  # noqa: E402
from rainfusion.integrations.head_budgets import CalibrationError, HeadBudgets  # noqa: E402
from rainfusion.integrations.report import Report, Row  # noqa: E402

__all__ = [
    "REST",
    "Adapter",
    "Calibration",
    "CalibrationError",
    "ConfigError",
    "DriftRow",
    "Grid",
    "Handle",
    "HeadBudgets",
    "Hoist",
    "Order",
    "RainFusionConfig",
    "Report",
    "Row",
    "Text",
    "Tokens",
    "UnknownModelError",
    "apply_rainfusion",
    "calibrate",
    "drift_threshold",
    "measure_drift",
    "register_adapter",
    "remove_rainfusion",
]
