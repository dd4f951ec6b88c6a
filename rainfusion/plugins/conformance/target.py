"""Target: the backend under test on one device, and how a case runs there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from rainfusion.core.backend import Backend, Capabilities, Device
from rainfusion.core.errors import BackendUnavailableError
from rainfusion.core.ir import Plan
from rainfusion.core.lower import Executable, lower
from rainfusion.core.mask import BlockMask
from rainfusion.core.policy import Fixed
from rainfusion.plugins.conformance.cases import Case
from rainfusion.plugins.manager import host

Array = Any

STAND_IN = "RAINFUSION_STAND_IN"
"""Environment variable that names what imitates the device, where the backend cannot know it."""


@dataclass(frozen=True)
class Target:
    """A backend and one of its devices."""

    backend: Backend
    device: Device

    @property
    def capabilities(self) -> Capabilities:
        """What the backend claims for this device."""
        return self.backend.capabilities(self.device)

    @property
    def revision(self) -> int:
        """The revision of the backend's results that its announcement states."""
        return host().announced(self.backend.name).spec.revision

    @property
    def stand_in(self) -> str:
        """What imitates the device, by the environment or by the backend; empty for the real thing."""
        return os.environ.get(STAND_IN) or self.device.stand_in

    def objections(self, case: Case) -> str:
        """What the case needs and the backend does not claim; empty where it claims all."""
        return "; ".join(self.backend.objections(case.plan(), self.device))

    def tensors(self, case: Case) -> tuple[Array, Array, Array]:
        """The case's q, k, v on the device: in its dtype, tensor layout and strides."""
        q, k, v = (self._tensor(x, case) for x in case.inputs())
        return q, k, v

    def _tensor(self, x: np.ndarray, case: Case) -> Array:
        problem = case.problem
        laid_out = x if problem.tensor_layout == "bhsd" else x.swapaxes(1, 2)
        host_array = np.ascontiguousarray(laid_out, "float64" if problem.dtype == "float64" else "float32")
        if not case.strided:
            return self.backend.from_host(host_array, self.device, problem.dtype)
        fused = np.concatenate([host_array, host_array], axis=-1)  # as a model that projects q, k and v in one go
        return self.backend.from_host(fused, self.device, problem.dtype)[..., : problem.head_dim]

    def mask(self, mask: BlockMask) -> BlockMask:
        """A NumPy mask on the device."""
        blocks = self.backend.from_host(np.ascontiguousarray(mask.blocks), self.device)
        return BlockMask(blocks, mask.q_len, mask.kv_len, mask.block)

    def lower(self, plan: Plan) -> Executable:
        """The plan lowered for this backend and device, whatever else is installed."""
        return lower(plan, self.backend, self.device)

    def run(self, case: Case, plan: Plan, mask: BlockMask | None = None) -> Outcome:
        """Run a plan on the case's inputs; `mask`, on NumPy, where the plan's policy is `Fixed`."""
        result = self.lower(plan)(*self.tensors(case), mask=None if mask is None else self.mask(mask))
        return self.outcome(plan, result)

    def under(self, case: Case, mask: BlockMask | None, *, lse: bool) -> Outcome:
        """Output, and log-sum-exp if wanted, of a case under a given mask (on NumPy); None for a dense plan."""
        policy = case.policy if mask is None else Fixed()
        return self.run(case, case.plan(policy=policy, returns=("%out", "%lse") if lse else ("%out",)), mask)

    def selected(self, case: Case) -> BlockMask:
        """The mask, on NumPy, that the backend selects for a case."""
        blocks = self.run(case, case.plan(returns=("%out", "%mask"))).blocks
        assert blocks is not None
        return BlockMask(blocks, case.problem.q_len, case.problem.kv_len, case.layout.block)

    def outcome(self, plan: Plan, result: Any) -> Outcome:
        """What a call of `plan` returned, on the host and by name."""
        results = dict(zip(plan.returns, result if len(plan.returns) > 1 else (result,), strict=True))
        out = self.to_float64(results["%out"])
        lse = self.to_float64(results["%lse"]) if "%lse" in results else None
        blocks = self.backend.to_host(results["%mask"].blocks) if "%mask" in results else None
        return Outcome(out if plan.problem.tensor_layout == "bhsd" else out.swapaxes(1, 2), lse, blocks)

    def to_float64(self, array: Array) -> np.ndarray:
        """The values of one of the backend's arrays."""
        return np.asarray(self.backend.to_host(array), dtype=np.float64)

    def __str__(self) -> str:
        return f"{self.backend.name} on {self.device}"


@dataclass(frozen=True, eq=False)
class Outcome:
    """Results of one run on the host.

    Attributes:
        out: float64 ``[B, H, q_len, D]``.
        lse: float64 ``[B, H, q_len]``, where it was asked for.
        blocks: bool ``[B, H, q blocks, key blocks]``, where the mask was asked for.
    """

    out: np.ndarray
    lse: np.ndarray | None = None
    blocks: np.ndarray | None = None


def find_target(backend: str, device: str | None = None) -> Target:
    """The announced backend of that name on a device (default: its best).

    Raises:
        BackendError: the name is unknown, the backend does not load, or there is no such device. No
            evidence is never green.
    """
    loaded = host().backend(backend)
    try:
        present = list(loaded.devices())
    except Exception as error:  # a vendor's probe fails in every way there is
        raise BackendUnavailableError(f"{backend} cannot list its devices: {type(error).__name__}: {error}") from error
    found = [d for d in present if device in (None, str(d), d.type)]
    if not found:
        there = ", ".join(map(str, present)) or "none"
        raise BackendUnavailableError(
            f"nothing to test: backend {backend!r} finds no device{'' if device is None else ' ' + device} here "
            f"(devices: {there})"
        )
    return Target(loaded, found[0])
