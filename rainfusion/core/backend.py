"""What a backend is: devices it drives, capabilities it declares once, kernels it offers.

A backend subclasses `Backend` and is announced by a `BackendSpec`, which is all that is read before use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from rainfusion.core.ops import Op
from rainfusion.core.plan import Plan
from rainfusion.core.problem import DTYPES, TENSOR_LAYOUTS

Array = Any
AnyOp = TypeVar("AnyOp", bound=Op)
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""What a kernel builds: from the values a segment reads, by name, to those it makes that something else reads."""

INTERFACE = 1
"""The version of what `Backend` and `Kernel` promise; raised when a backend must change with it."""

# How a backend that owns the tensors ranks among others that do, higher first (`Backend.preference`).
ORACLE, PORTABLE, VENDOR, TUNED = 0, 10, 50, 100


@dataclass(frozen=True)
class BackendSpec:
    """The announcement of a backend: strings only, nothing is imported until it is used.

    Args:
        name: what users write; unique.
        target: ``"package.module:Class"``, a `Backend` subclass.
        requires: importable names that must be present; looked up, not imported.
        install: what to type where they are not.
        isolate: probing it may end the interpreter, so `rainfusion devices` probes it in its own process.
        revision: of the backend's results. Raise it with a change after which they may differ; the hardware
            matrix then takes records made before for out of date.
        arrays: whose arrays it can own, ``"library"`` or ``"library:device type"``, such as ``"torch:cuda"``; the
            automatic choice imports it only for those. Empty: any.
        api: the interface version that the backend was written for (`INTERFACE`).
    """

    name: str
    target: str
    requires: tuple[str, ...] = ()
    install: str = ""
    isolate: bool = False
    revision: int = 1
    arrays: tuple[str, ...] = ()
    api: int = INTERFACE


@dataclass(frozen=True)
class Device:
    """One device a backend drives. `str` gives the address users write: ``cuda:0``, ``cpu``.

    Args:
        type, index: of the address.
        name: what the device calls itself.
        memory: bytes of its own memory, where that is known.
        stand_in: what imitates the device, such as an interpreter; empty for the real thing.
    """

    type: str
    index: int | None = None
    name: str = ""
    memory: int | None = None
    stand_in: str = ""

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


@dataclass(frozen=True)
class Capabilities:
    """What a backend can run on a device, declared once; selection, tests and tables read it.

    Attributes:
        dtypes: dtype names.
        head_dims: allowed head dims; None for any.
        blocks: allowed (query, key) block sizes; None for any.
        tensor_layouts: ``"bhsd"``, ``"bshd"``.
        gqa: fewer key/value heads than query heads.
        cross: q_len different from kv_len.
        lse: log-sum-exp on request.
        summary: ``omitted="summary"``.
        max_length: most tokens on a side; None for no limit.
    """

    dtypes: frozenset[str] = frozenset(DTYPES)
    head_dims: frozenset[int] | None = None
    blocks: frozenset[tuple[int, int]] | None = None
    tensor_layouts: frozenset[str] = frozenset(TENSOR_LAYOUTS)
    gqa: bool = True
    cross: bool = True
    lse: bool = True
    summary: bool = True
    max_length: int | None = None

    def objections(self, plan: Plan) -> list[str]:
        """Why this plan cannot run, one reason an entry; empty where it can."""
        p = plan.problem
        longest = max(p.q_len, p.kv_len)
        checks = (
            (p.dtype in self.dtypes, f"dtype {p.dtype} (it has {_listed(self.dtypes)})"),
            (_within(p.head_dim, self.head_dims), f"head dim {p.head_dim} (it has {_listed(self.head_dims)})"),
            (_within(plan.block, self.blocks), f"blocks of {plan.block} (it has {_listed(self.blocks)})"),
            (p.tensor_layout in self.tensor_layouts, f"tensor layout {p.tensor_layout}"),
            (self.gqa or p.group == 1, f"grouped-query attention ({p.heads}/{p.kv_heads} heads)"),
            (self.cross or p.q_len == p.kv_len, f"q_len {p.q_len} other than kv_len {p.kv_len}"),
            (self.lse or "%lse" not in plan.returns, "returning the log-sum-exp"),
            (self.summary or not plan.summarises, "omitted='summary'"),
            (self.max_length is None or longest <= self.max_length, f"{longest} tokens (at most {self.max_length})"),
        )
        return [f"no {what}" for holds, what in checks if not holds]


@dataclass(frozen=True)
class Segment:
    """A part of a plan that one kernel takes over.

    Attributes:
        ops: its operations, in program order.
        inputs: the values it reads from outside; constants are among them.
        outputs: the values it makes that something outside reads or that the plan returns.
    """

    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def wants(self, name: str | None) -> bool:
        """Whether something outside reads a value that is made inside."""
        return name in self.outputs

    def find(self, kind: type[AnyOp]) -> AnyOp | None:
        """The first operation of a type."""
        return next((op for op in self.ops if type(op) is kind), None)


@dataclass(frozen=True)
class Kernel:
    """What a backend offers for a part of a plan.

    Args:
        understands: the operation types it computes exactly as they are defined, all attributes and operands
            included. Lowering offers it the longest connected part of a plan that has no others.
        build: called when a plan is lowered, ``build(segment, plan, device)``; returns a function from the values
            that ``segment.inputs`` names to those that ``segment.outputs`` names, both by name, which may be called
            from several threads. It raises `LoweringError` with the reason where it cannot take this segment, and is
            then offered it without its last operation. An attribute ``how`` of that function, a few words, is shown
            by ``print(executable)``.
    """

    understands: frozenset[type[Op]]
    build: Callable[[Segment, Plan, Device], Run]


class Backend(ABC):
    """Base class of backends. Only `devices`, `device_of` and `capabilities` are required.

    Arrays inside a lowered plan are *native*: ``[batch, heads, tokens, channels]`` views in a library
    that array-api-compat knows, so that operations without a kernel run by their definition. `to_native` and
    `from_native` convert the array type only: they share memory where possible and never move data between devices.
    """

    name: ClassVar[str]

    @abstractmethod
    def devices(self) -> Sequence[Device]:
        """The devices present, best first; empty where there is none. Any exception counts as 'none, because'."""

    @abstractmethod
    def device_of(self, array: Array) -> Device | None:
        """The device of this backend on which `array` lives, or None where it is not this backend's."""

    @abstractmethod
    def capabilities(self, device: Device) -> Capabilities:
        """What runs on `device`."""

    def objections(self, plan: Plan, device: Device) -> Sequence[str]:
        """Why this plan cannot run on `device`, one reason an entry; empty where it can.

        By default what `capabilities` say; override it for limits that depend on several things at once.
        """
        return self.capabilities(device).objections(plan)

    def kernels(self, plan: Plan, device: Device) -> Sequence[Kernel]:
        """Kernels for parts of a plan; the longest part is taken, definitions run the rest."""
        return ()

    def preference(self, plan: Plan, device: Device) -> int:
        """Rank among backends that can run this plan: ORACLE 0, PORTABLE 10, VENDOR 50, TUNED 100."""
        return VENDOR

    def speedup(self, plan: Plan, device: Device) -> float | None:
        """How many times faster than dense attention the plan is estimated to be; None where nothing was measured.

        Below 1, `rainfusion.attention` warns: skipping blocks does not pay there.
        """
        return None

    def check_inputs(self, *tensors: Array) -> None:
        """Refuse inputs for a reason that neither shape nor dtype shows, with a ProblemError."""
        return

    def running(self, device: Device) -> AbstractContextManager[object]:
        """Entered around every call of a lowered plan: the place to fix modes that callers may have set."""
        return nullcontext()

    def to_native(self, array: Array) -> Array:
        """The array as this backend computes on it; the same memory where possible, always the same device."""
        return array

    def from_native(self, array: Array, like: Array, dtype: str) -> Array:
        """A result as the caller's kind of array: library and device of `like`, the dtype of that name."""
        return array

    def from_host(self, array: np.ndarray, device: Device, dtype: str | None = None) -> Array:
        """An array on `device`, of the kind callers of this backend pass in, with a NumPy array's values.

        For constants of a plan and for test inputs: the one place where data is meant to move.

        Args:
            dtype: name of the dtype to convert to, ``"bfloat16"`` included; None keeps that of `array`.
        """
        return array if dtype is None else array.astype(dtype)

    def to_host(self, array: Array) -> np.ndarray:
        """A NumPy array with the values of one of this backend's arrays, float32 for bfloat16."""
        return np.asarray(array)

    def synchronize(self, device: Device) -> None:
        """Return when all work on `device` is done; only measuring needs it."""
        return


def _within(value: Any, allowed: frozenset[Any] | None) -> bool:
    return allowed is None or value in allowed


def _listed(values: frozenset[Any] | None) -> str:
    return "any" if values is None else ", ".join(map(str, sorted(values)))
