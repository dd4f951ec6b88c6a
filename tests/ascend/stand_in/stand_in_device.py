"""A pytest plugin for the stand-in device: torch's own operators on it, and a name that nobody can mistake."""

from __future__ import annotations

import os

import torch
import torch_npu  # noqa: F401  # whatever TORCH_DEVICE_BACKEND_AUTOLOAD says
from host_operators import install

LIBRARY = install()
POSES_AS = os.environ.get("STAND_IN_SOC", "Ascend910B3")

torch.npu.get_device_name = lambda device=None: f"stand-in in host memory, no Ascend device, posing as {POSES_AS}"
