"""Which kernel attends, with which settings: Hopper's own where it fits, the plain one everywhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from rainfusion.backends.triton import hardware, tuning
from rainfusion.backends.triton.attend_blocks import attend_blocks
from rainfusion.backends.triton.operands import Attention
from rainfusion.backends.triton.tuning import CANDIDATES, AttendConfig, attend_configs
from rainfusion.core.errors import LoweringError, RainfusionWarning, warn_caller
from rainfusion.core.locks import ProcessLock
from rainfusion.core.ops import Attend, AttendQuantised
from rainfusion.core.plan import Plan

LARGEST_HEAD_DIM = 256
_LONGEST_STRIDE = 2**23  # from token to token: a tile's offsets are counted in int32
_SCALES = (1e-6, 1e6)  # beyond, a bias divided by the scale may leave float32
_HOPPER_DIMS = (64, 128)
_GLUON_FROM = "3.6"  # the oldest Triton on which Hopper's kernel was seen to compile

_DOES_NOT_FIT: tuple[type[Exception], ...] = (*tuning.DOES_NOT_COMPILE, AttributeError, TypeError)
_refused: set[torch.device] = set()  # devices for which this Triton did not compile Hopper's kernel
_lock = ProcessLock()


class HopperUnavailableError(Exception):
    """This Triton does not compile Hopper's kernel, and no other does what it was asked for."""


@dataclass
class AttentionKernel:
    """The attention kernel of one lowered plan on one device.

    Attributes:
        device: where it runs.
        hopper: the module of Hopper's kernel, where it takes this plan.
        configs: settings of the plain kernel, the best first; what the device cannot hold is dropped on first use.
            Empty where the plain kernel does not compute what is asked for: attention in 8 bits.
        precision: a name from `hardware.precision`.
        is_tuned: whether the order of `configs` is final.
    """

    device: torch.device
    hopper: Any
    configs: list[AttendConfig]
    precision: str
    is_tuned: bool = True
    _lock: ProcessLock = field(default_factory=ProcessLock, repr=False)

    @classmethod
    def of(cls, op: Attend, plan: Plan, device: torch.device, mean_dtype: torch.dtype | None) -> AttentionKernel:
        """The kernel of an operation; `mean_dtype` is that of the means that stand for omitted blocks, if any do."""
        q, architecture = plan.types[op.q], hardware.architecture(device)
        itemsize = max(getattr(torch, q.dtype).itemsize, 0 if mean_dtype is None else mean_dtype.itemsize)
        configs = attend_configs(itemsize, q.shape[3], architecture)
        fits = takes_hopper(op, plan, architecture, has_wide_means=mean_dtype == torch.float32)
        is_tuned = hardware.interprets() or not tuning.is_requested()
        return cls(device, _hopper() if fits else None, list(configs), hardware.precision(device), is_tuned)

    @classmethod
    def in_8_bits(cls, op: Attend, plan: Plan, device: torch.device) -> AttentionKernel:
        """The kernel of an attention in 8 bits, which is Hopper's.

        Raises:
            LoweringError: Hopper's kernel is not written for this attention, or this Triton does not compile it, as far
                as is known.
        """
        dim, module = plan.types[op.q].shape[3], _hopper()
        if not _fits_hopper(op, dim):
            raise LoweringError(f"attention in 8 bits of head dim {dim} at scale {op.scale:g}")
        if module is None or device in _refused:
            raise LoweringError(
                f"attention in 8 bits needs a Triton that compiles Hopper's kernel, such as {_GLUON_FROM}; this is "
                f"{triton.__version__}"
            )
        return cls(device, module, [], hardware.precision(device))

    def wants_copy(self, x: Tensor, order: Tensor | None, lengths: Tensor | None = None) -> bool:
        """Whether `x`, read through `order`, is better copied into block order first than read where it lies.

        The copy engine reads whole blocks, so keys and values beyond a length must have become zeros.
        """
        if order is not None or max(x.stride()[2:]) > _LONGEST_STRIDE:
            return True
        return self.uses_hopper and (lengths is not None or not self.hopper.can_fetch(x))

    @property
    def uses_hopper(self) -> bool:
        """Whether Hopper's kernel takes the plan and compiles here, as far as is known."""
        return self.hopper is not None and self.device not in _refused

    def __str__(self) -> str:
        if self.uses_hopper:
            return "Hopper kernel"
        return "plain kernel" if self.configs else "definitions"  # nothing else attends in 8 bits

    def __call__(self, given: Attention, out: Tensor, lse: Tensor | None) -> None:
        """Write output ``[B, H, q_len, D]`` and, unless None, log-sum-exp ``[B, H, q_len]``."""
        if self.uses_hopper:
            try:
                self.hopper.attend_hopper(given, out, lse)
                return
            except _DOES_NOT_FIT as error:
                self._refuse(error, "their definitions take" if given.quantised else "the plain kernel takes")
        if given.quantised is not None:
            raise HopperUnavailableError
        self._attend_plainly(partial(attend_blocks, given, out, lse, precision=self.precision))

    def _refuse(self, error: Exception, instead: str) -> None:
        """Gluon changes from one Triton to the next: say so once, and do without it on this device."""
        with _lock:
            if self.device in _refused:
                return
            _refused.add(self.device)
        reason = str(error).strip().rpartition("\n")[2]
        warn_caller(
            f"Triton {triton.__version__} does not compile the Hopper kernel ({type(error).__name__}: {reason}); "
            f"{instead} over, which is slower. It is known to compile on Triton {_GLUON_FROM}",
            RainfusionWarning,
        )

    def _attend_plainly(self, launch: Any) -> None:
        if not self.is_tuned:
            with self._lock:
                if not self.is_tuned:
                    tuned = tuning.fastest_first(dict.fromkeys([*self.configs, *CANDIDATES]), launch)
                    self.configs, self.is_tuned = tuned or self.configs, True
        while True:
            config = self.configs[0]
            try:
                launch(config)
                return
            except OutOfResources:
                with self._lock:
                    if len(self.configs) == 1:
                        raise
                    if self.configs[0] == config:
                        del self.configs[0]


def takes_hopper(op: Attend, plan: Plan, architecture: str, *, has_wide_means: bool) -> bool:
    """Whether Hopper's kernel is written for this attention.

    Means in float32 are not, except in 8 bits: beside a log-sum-exp, rounding them to 16 bits would show in its last
    digits.
    """
    q = plan.types[op.q]
    in_16_bits = q.dtype in ("float16", "bfloat16") and not has_wide_means
    return architecture == "sm_90" and _fits_hopper(op, q.shape[3]) and (in_16_bits or isinstance(op, AttendQuantised))


def _fits_hopper(op: Attend, dim: int) -> bool:
    """Whether Hopper's kernel has this head dim, these blocks and this scale, in any precision."""
    return dim in _HOPPER_DIMS and op.block == (128, 128) and _SCALES[0] < op.scale < _SCALES[1]


def _hopper() -> Any:
    """The module of Hopper's kernel, or None where this Triton has no Gluon, or another one."""
    try:
        return import_module("rainfusion.backends.triton.hopper")
    except (ImportError, AttributeError):
        return None
