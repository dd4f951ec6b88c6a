"""Choosing a backend: who owns the tensors' device, who can run the plan, who is preferred, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from numbers import Integral, Real
from typing import Any, cast

from rainfusion.core.arrays import how_to_pass
from rainfusion.core.backend import Backend, Device
from rainfusion.core.checks import shown
from rainfusion.core.errors import BackendError, NoBackendError, readable, said
from rainfusion.core.plan import Plan

_MOST_DEVICES, _MOST_OBJECTIONS = 4096, 64


@dataclass(frozen=True)
class Refusal:
    """Why a backend is out: at stage ``disabled``, ``load``, ``probe`` or ``reject``, and how to get it in.

    Attributes:
        late: it has not answered yet; it may be in at a later call.
    """

    backend: str
    stage: str
    reason: str
    install: str = ""
    late: bool = False

    def __post_init__(self) -> None:
        for name in ("backend", "stage", "reason", "install"):  # they quote plugins, and end up on terminals
            object.__setattr__(self, name, readable(getattr(self, name)))


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

    @property
    def late(self) -> tuple[Refusal, ...]:
        """The backends that have not answered yet; the next choice may be another."""
        return tuple(refusal for refusal in self.refusals if refusal.late)


Override = Callable[[Plan, Sequence[Candidate]], Candidate | None]
Answered = tuple[list[Candidate], Refusal | None]
Ask = Callable[[Backend, Callable[[], Answered]], Answered]


def candidates(
    plan: Plan, backends: Iterable[Backend], *, array: Any = None, device: str | None = None, ask: Ask | None = None
) -> tuple[list[Candidate], list[Refusal]]:
    """The backends that can run `plan` where `array` lives, or else on the device of that address.

    With neither, every device of every backend is considered. Best first.

    Args:
        ask: how a question is put to a backend, ``ask(backend, question)``; by default it is called here and now.
    """
    able: list[Candidate] = []
    refusals: list[Refusal] = []
    for backend in backends:
        question = partial(_candidates_of, backend, plan, array, device)
        found, refusal = question() if ask is None else ask(backend, question)
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


def _candidates_of(backend: Backend, plan: Plan, array: Any, device: str | None) -> Answered:
    try:
        devices = _devices(backend, array, device)
        objections = {str(d): _objections(backend, plan, d) for d in devices}
        able = [_candidate(backend, plan, d) for d in devices if not objections[str(d)]]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a backend may fail in any way; that is a reason, not our failure
        return [], Refusal(backend.name, "probe", said(error))
    if not devices:
        return [], Refusal(backend.name, "reject", _not_its_device(array, device))
    if able:
        return able, None
    return [], Refusal(backend.name, "reject", "; ".join(objections[str(devices[0])]))


def _devices(backend: Backend, array: Any, device: str | None) -> list[Device]:
    if array is not None:
        owner = backend.device_of(array)
        return [] if owner is None else [checked_device(backend.name, owner, "device_of")]
    return [d for d in devices_of(backend) if device in (None, str(d), d.type)]


def devices_of(backend: Backend) -> list[Device]:
    """What `Backend.devices` lists.

    Raises:
        BackendError: no devices, or too many to be any.
    """
    found = listed(backend.devices(), _MOST_DEVICES, f"devices() of backend {backend.name!r}", "a list of Device")
    return [checked_device(backend.name, device, "devices") for device in found]


def breach(backend: Backend, plan: Plan, device: Device) -> str:
    """What is wrong with a backend's answers about a plan on a device; empty for nothing."""
    try:
        if not _objections(backend, plan, device):
            _candidate(backend, plan, device)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return said(error)
    return ""


def checked_device(name: str, device: Any, method: str) -> Device:
    """The device itself.

    Raises:
        BackendError: a backend gave something else.
    """
    is_one = isinstance(device, Device) and type(device.type) is str and type(device.name) is str
    if not is_one or not device.type.isprintable() or not (device.index is None or type(device.index) is int):
        raise BackendError(f"{method}() of backend {name!r} gave {shown(device)}; give Device('type', index, 'name')")
    return cast(Device, device)


def _objections(backend: Backend, plan: Plan, device: Device) -> list[str]:
    given = backend.objections(plan, device)
    said_so = listed(given, _MOST_OBJECTIONS, f"objections() of backend {backend.name!r}", "a list of texts")
    if not all(isinstance(text, str) for text in said_so):
        raise BackendError(f"objections() of backend {backend.name!r} gave {shown(given)}; give a list of texts")
    return said_so


def _candidate(backend: Backend, plan: Plan, device: Device) -> Candidate:
    preference, speedup = backend.preference(plan, device), backend.speedup(plan, device)
    if not _is_finite(preference):
        raise BackendError(f"preference() of backend {backend.name!r} gave {shown(preference)}; give a finite number")
    if speedup is not None and not (_is_finite(speedup) and speedup > 0):
        raise BackendError(
            f"speedup() of backend {backend.name!r} gave {shown(speedup)}; give a positive number, or None"
        )
    rank = int(preference) if isinstance(preference, Integral) else cast(int, float(preference))
    return Candidate(backend, device, rank, None if speedup is None else float(speedup))


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def listed(value: Any, most: int, what: str, wanted: str) -> list[Any]:
    """What a plugin gives where several things are due, as a list; it may be an iterator without an end."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise BackendError(f"{what} gave {shown(value)}; give {wanted}")
    found = list(islice(value, most + 1))
    if len(found) > most:
        raise BackendError(f"{what} gave more than {most} things; give {wanted}")
    return found


def _not_its_device(array: Any, device: str | None) -> str:
    if array is None:
        return "has no device" if device is None else f"has no device {device}"
    kind = f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}"
    return f"does not drive the device of a {kind} on {getattr(array, 'device', 'the host')}{how_to_pass(array)}"
