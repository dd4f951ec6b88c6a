"""Target: the backend under test on one device, and how a case runs there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rainfusion.core.backend import Backend, Capabilities, Device
from rainfusion.core.errors import BackendUnavailableError
from rainfusion.core.executable import Executable
from rainfusion.core.lowering import lower
from rainfusion.core.mask import BlockMask
from rainfusion.core.plan import Plan
from rainfusion.core.policies import Fixed
from rainfusion.plugins.manager import host
from rainfusion.testing.cases import Case

Array = Any
Results = Mapping[str, np.ndarray]

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

    def described(self) -> dict[str, Any]:
        """What a report says of it: names, the revision of the backend's results, what imitates the device, claims."""
        claims = asdict(self.capabilities).items()
        return {
            "backend": self.backend.name,
            "revision": host().announced(self.backend.name).spec.revision,
            "device": str(self.device),
            "device_name": self.device.name,
            "stand_in": os.environ.get(STAND_IN) or self.device.stand_in,
            "capabilities": {key: sorted(value) if isinstance(value, frozenset) else value for key, value in claims},
        }

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
        on_host = np.ascontiguousarray(laid_out, "float64" if problem.dtype == "float64" else "float32")
        if case.strided:  # as in a model that projects q, k and v in one go
            on_host = np.concatenate([on_host, on_host], axis=-1)
        array = self.backend.from_host(on_host, self.device, problem.dtype)
        return array[..., : problem.head_dim] if case.strided else array

    def mask(self, mask: BlockMask) -> BlockMask:
        """A NumPy mask on the device."""
        blocks = self.backend.from_host(np.ascontiguousarray(mask.blocks), self.device)
        return BlockMask(blocks, mask.q_len, mask.kv_len, mask.block)

    def lower(self, plan: Plan) -> Executable:
        """The plan lowered for this backend and device, whatever else is installed."""
        return lower(plan, self.backend, self.device)

    def run(self, case: Case, plan: Plan, mask: BlockMask | None = None) -> Results:
        """Run a plan on the case's inputs; `mask`, on NumPy, where the plan reads one."""
        operands = {name: self.backend.from_host(x, self.device) for name, x in case.operands(plan).items()}
        on_device = None if mask is None else self.mask(mask)
        return self.results(plan, self.lower(plan)(*self.tensors(case), mask=on_device, **operands))

    def under(self, case: Case, mask: BlockMask | None, *, lse: bool) -> Results:
        """Output, and log-sum-exp if wanted, of a case under a given mask (on NumPy); None for a dense plan."""
        policy = case.policy if mask is None else Fixed()
        return self.run(case, case.plan(policy=policy, returns=("%out", "%lse") if lse else ("%out",)), mask)

    def selected(self, case: Case) -> BlockMask:
        """The mask, on NumPy, that the backend selects for a case."""
        return case.block_mask(self.run(case, case.plan(returns=("%out", "%mask")))["%mask"])

    def results(self, plan: Plan, result: Any) -> dict[str, np.ndarray]:
        """What a call of `plan` returned, on the host and by name.

        Masks are bool, everything else float64; tensors in ``[batch, heads, tokens, channels]``.
        """
        values = result if len(plan.returns) > 1 else (result,)
        masks = [isinstance(value, BlockMask) for value in values]
        found = [
            self.backend.to_host(x.blocks) if m else self.to_float64(x) for x, m in zip(values, masks, strict=True)
        ]
        named = dict(zip(plan.returns, found, strict=True))
        if plan.problem.tensor_layout != "bhsd" and "%out" in named:
            named["%out"] = named["%out"].swapaxes(1, 2)
        return named

    def to_float64(self, array: Array) -> np.ndarray:
        """The values of one of the backend's arrays."""
        return np.asarray(self.backend.to_host(array), dtype=np.float64)

    def __str__(self) -> str:
        return f"{self.backend.name} on {self.device}"


def find_target(backend: str | None, device: str | None = None) -> Target:
    """The announced backend of that name on a device (default: its best).

    Raises:
        BackendError: no name, an unknown one, a backend that does not load, or no such device.
    """
    if not backend:
        raise BackendUnavailableError("no backend to test: give --rainfusion-backend, or set `backend` in the subclass")
    loaded = host().backend(backend)
    try:
        present = list(loaded.devices())
    except Exception as error:  # a driver stack may raise anything
        raise BackendUnavailableError(f"{backend} cannot list its devices: {type(error).__name__}: {error}") from error
    for found in present:
        if device in (None, str(found), found.type):
            return Target(loaded, found)
    which, there = "" if device is None else f" {device}", ", ".join(map(str, present)) or "none"
    raise BackendUnavailableError(
        f"nothing to test: backend {backend!r} finds no device{which} here (devices: {there})"
    )
