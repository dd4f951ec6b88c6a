"""Choosing a backend: who owns the tensors' device, who can run the plan, who is preferred, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rainfusion.core.arrays import how_to_pass
from rainfusion.core.backend import Backend, Device
from rainfusion.core.errors import NoBackendError
from rainfusion.core.plan import Plan


@dataclass(frozen=True)
class Refusal:
    """Why a backend is out: at stage ``disabled``, ``load``, ``probe`` or ``reject``, and how to get it in."""

    backend: str
    stage: str
    reason: str
    install: str = ""


@dataclass(frozen=True)
class Candidate:
    """A backend that can run the plan on a device; the highest preference is taken.

    Attributes:
        speedup: against dense attention, as the backend estimates it (`Backend.speedup`).
    """

    backend: Backend
    device: Device
    preference: int
    speedup: float | None = None

    def __str__(self) -> str:
        return f"{self.backend.name} on {self.device}"


@dataclass(frozen=True)
class Choice:
    """The candidate taken, the reason in words, and the backends that were out."""

    candidate: Candidate
    why: str
    refusals: tuple[Refusal, ...]


Override = Callable[[Plan, Sequence[Candidate]], Candidate | None]


def candidates(
    plan: Plan, backends: Iterable[Backend], *, array: Any = None, device: str | None = None
) -> tuple[list[Candidate], list[Refusal]]:
    """The backends that can run `plan` where `array` lives, or else on the device of that address.

    With neither, every device of every backend is considered. Best first.
    """
    able, refusals = [], []
    for backend in backends:
        found, refusal = _candidates_of(backend, plan, array, device)
        able += found
        refusals += [refusal] if refusal else []
    return sorted(able, key=lambda candidate: -candidate.preference), refusals


def choose(
    plan: Plan, able: Sequence[Candidate], refusals: Sequence[Refusal], asked: str | None, override: Override
) -> Choice:
    """Take the best candidate.

    Args:
        asked: how the backend was named explicitly (for the explanation), or None for automatic choice.
        override: what plugins decide (`rainfusion_choose_backend`); only asked when the choice is automatic.

    Raises:
        NoBackendError: there is no candidate; the message lists every refusal.
    """
    if not able:
        what = f"{asked} cannot run this plan" if asked else "no backend can run this plan"
        raise NoBackendError(f"{what}:\n{refusal_table(refusals)}")
    if asked:
        return Choice(able[0], f"{able[0]}: asked for by {asked}{_estimate(able[0])}", tuple(refusals))
    overridden = override(plan, able)
    if overridden is not None:
        why = f"{overridden}: chosen by a plugin's rainfusion_choose_backend{_estimate(overridden)}"
        return Choice(overridden, why, tuple(refusals))
    others = ", ".join(f"{c} ({c.preference})" for c in able[1:])
    why = f"highest preference ({able[0].preference}), before {others}" if others else "the only one that can"
    return Choice(able[0], f"{able[0]}: {why}{_estimate(able[0])}", tuple(refusals))


def _estimate(taken: Candidate) -> str:
    return "" if taken.speedup is None else f"; estimated {taken.speedup:.2g} times as fast as dense attention"


def refusal_table(refusals: Sequence[Refusal]) -> str:
    """Refusals as an aligned table of backend, stage, reason and install hint."""
    rows = [("backend", "stage", "reason", "install")]
    rows += [(r.backend, r.stage, r.reason, r.install) for r in refusals]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  " + "  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]).rstrip() for r in rows
    )


def _candidates_of(
    backend: Backend, plan: Plan, array: Any, device: str | None
) -> tuple[list[Candidate], Refusal | None]:
    try:
        devices = _devices(backend, array, device)
        objections = {d: backend.objections(plan, d) for d in devices}
        able = [
            Candidate(backend, d, backend.preference(plan, d), backend.speedup(plan, d))
            for d in devices
            if not objections[d]
        ]
    except (Exception, SystemExit) as error:  # a backend may fail in any way; that is a reason, not our failure
        return [], Refusal(backend.name, "probe", f"{type(error).__name__}: {error}")
    if not devices:
        return [], Refusal(backend.name, "reject", _not_its_device(array, device))
    if able:
        return able, None
    return [], Refusal(backend.name, "reject", "; ".join(objections[devices[0]]))


def _devices(backend: Backend, array: Any, device: str | None) -> list[Device]:
    if array is not None:
        owner = backend.device_of(array)
        return [] if owner is None else [owner]
    return [d for d in backend.devices() if device in (None, str(d), d.type)]


def _not_its_device(array: Any, device: str | None) -> str:
    if array is None:
        return "has no device" if device is None else f"has no device {device}"
    kind = f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}"
    return f"does not drive the device of a {kind} on {getattr(array, 'device', 'the host')}{how_to_pass(array)}"
