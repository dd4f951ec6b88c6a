"""Which kernel attends, with which settings: Hopper's own where it fits, the plain one everywhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from rainfusion.backends.triton import chip, tune
from rainfusion.backends.triton.attend_blocks import attend_blocks
from rainfusion.backends.triton.configs import CANDIDATES, AttendConfig, attend_configs
from rainfusion.backends.triton.operands import Attention
from rainfusion.core.errors import RainfusionWarning, warn_caller
from rainfusion.core.ir import Plan

WIDEST = 256
_LONGEST_STRIDE = 2**23  # a tile's offsets are counted in int32
_SCALES = (1e-6, 1e6)  # beyond, a bias divided by the scale may leave float32


@dataclass
class Attend:
    """Attention for one plan on one device.

    Attributes:
        hopper: the module of Hopper's kernel, where it takes this plan.
        configs: settings of the plain kernel, the best first; what the device cannot hold is dropped on first use.
        is_tuned: whether their order is final.
    """

    hopper: Any
    configs: list[AttendConfig]
    precision: str
    is_tuned: bool = True
    _lock: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def of(cls, plan: Plan, device: torch.device, *, mean_dtype: torch.dtype | None) -> Attend:
        """The kernel for a plan; `mean_dtype` is that of the means that stand for skipped blocks, if any do."""
        problem = plan.problem
        widest = max(getattr(torch, problem.dtype).itemsize, 0 if mean_dtype is None else mean_dtype.itemsize)
        configs = attend_configs(widest, problem.head_dim, chip.architecture(device))
        hopper = None if mean_dtype == torch.float32 else _hopper(plan, device)
        is_tuned = device.type != "cuda" or not tune.is_asked()
        return cls(hopper, list(configs), chip.precision(device), is_tuned)

    def wants_copy(self, x: Tensor, order: Tensor | None) -> bool:
        """Whether `x`, walked through `order`, is better folded into blocks first than read where it lies."""
        if order is not None or max(x.stride()) > _LONGEST_STRIDE:
            return True
        return self.hopper is not None and not self.hopper.can_fetch(x)

    def __str__(self) -> str:
        return "Hopper kernel" if self.hopper is not None else "plain kernel"

    def __call__(self, given: Attention, out: Tensor, lse: Tensor | None) -> None:
        """Write output ``[B, H, q_len, D]`` and, unless None, log-sum-exp ``[B, H, q_len]``."""
        if self.hopper is not None:
            try:
                self.hopper.attend_hopper(given, out, lse)
                return
            except (CompilationError, PTXASError) as error:  # Gluon changes from one Triton to the next
                self.hopper = None
                reason = str(error).strip().rpartition("\n")[2]
                said = f"Triton {triton.__version__} does not compile the Hopper kernel ({reason})"
                warn_caller(f"{said}; the plain kernel takes over", RainfusionWarning)
        if not self.is_tuned:
            with self._lock:
                candidates = dict.fromkeys([*self.configs, *CANDIDATES])
                launch = partial(attend_blocks, given, out, lse, precision=self.precision)
                self.configs, self.is_tuned = tune.fastest_first(candidates, launch), True
        while True:
            config = self.configs[0]
            try:
                attend_blocks(given, out, lse, config, self.precision)
                return
            except OutOfResources:
                with self._lock:
                    if len(self.configs) == 1:
                        raise
                    if self.configs[0] == config:
                        del self.configs[0]


def _hopper(plan: Plan, device: torch.device) -> Any:
    """The module of Hopper's kernel, or None where it does not take this plan or this Triton has no Gluon."""
    problem = plan.problem
    fits = (
        chip.architecture(device) == "sm_90"
        and problem.dtype in ("float16", "bfloat16")
        and problem.head_dim in (64, 128)
        and plan.block == (128, 128)
        and _SCALES[0] < problem.scale < _SCALES[1]
    )
    try:
        return import_module("rainfusion.backends.triton.attend_hopper") if fits else None
    except (ImportError, AttributeError):  # a Triton without Gluon, or with another one
        return None
