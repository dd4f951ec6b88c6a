"""lower(): a plan and a backend's kernels become an Executable.

From the first operation that nothing runs yet, every kernel is offered the longest part of the program that it
understands whole; the one that takes most gets it. What no kernel takes runs by its definition on the backend's own
arrays. An operation that a kernel does not know is never inside such a part, and what depends on it comes after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from rainfusion.core import blame
from rainfusion.core.backend import Backend, Device, Kernel, Run, Segment
from rainfusion.core.checks import shown
from rainfusion.core.errors import LoweringError
from rainfusion.core.executable import DEFINITION, Executable, Step
from rainfusion.core.ops import Op, signature
from rainfusion.core.plan import Plan

Array = Any


def lower(plan: Plan, backend: Backend, device: Device, *, strict: bool = False, **details: Any) -> Executable:
    """Lower `plan` for `device`.

    Args:
        strict: forbid operations that no kernel of the backend takes.

    Raises:
        LoweringError: under `strict`, naming the operation and what each kernel said.
    """
    ops = [op for op in plan.ops if op.reads]  # the others are constants
    parts: list[_Part] = [_Part((op,), None, "") for op in ops]
    with blame.naming(backend, "lower"):
        kernels = blame.checked_kernels(backend, backend.kernels(plan, device))
    while (start := next((part for part in parts if part.run is None), None)) is not None:
        with blame.naming(backend, "lower"):
            taken, declined = _best(start, parts, kernels, plan, device)
        if taken is None:
            if strict:
                said = "; ".join(dict.fromkeys(declined)) or "it offers none for this operation"
                raise LoweringError(
                    f"{backend.name} on {device} has no kernel for `{', '.join(start.ops[0].makes)} = {start.ops[0]}` "
                    f"({said}); "
                    "lower with strict=False to run it by its definition"
                )
            taken = _Part(start.ops, _by_definition(start.ops[0]), DEFINITION)
        else:
            taken = _Part(taken.ops, taken.run, backend.name)
        at = parts.index(start)
        parts = [taken if i == at else part for i, part in enumerate(parts) if i == at or part.ops[0] not in taken.ops]
    steps = tuple(Step(_segment(part.ops, plan), part.run, part.by) for part in _in_order(parts) if part.run)
    return Executable(plan, backend, device, steps, Constants(plan, backend, device), **details)


@dataclass(frozen=True)
class _Part:
    """Operations that run together: by a kernel, by a definition, or, where `run` is None, not settled yet."""

    ops: tuple[Op, ...]
    run: Run | None
    by: str

    @property
    def makes(self) -> set[str]:
        return {name for op in self.ops for name in op.makes}

    @property
    def reads(self) -> set[str]:
        return {name for op in self.ops for name in op.reads} - self.makes


def _best(
    start: _Part, parts: Sequence[_Part], kernels: Iterable[Kernel], plan: Plan, device: Device
) -> tuple[_Part | None, list[str]]:
    """The longest part from `start` on that a kernel takes, and what the kernels said that did not."""
    offers = [(ops, kernel) for kernel in kernels if (ops := _understood(start, parts, kernel))]
    declined: list[str] = []
    while offers:
        offers.sort(key=lambda offer: -len(offer[0]))  # stable: of equals the backend's first
        ops, kernel = offers.pop(0)
        try:
            run = kernel.build(_segment(ops, plan), plan, device)
            if not callable(run):
                raise TypeError(f"build returned {shown(run)}; return the function that runs the segment")
            return _Part(ops, run, ""), declined
        except LoweringError as reason:
            declined.append(f"{'+'.join(op.name for op in ops)}: {reason}")
        if len(ops) > 1:
            offers.append((ops[:-1], kernel))
    return None, declined


def _understood(start: _Part, parts: Sequence[_Part], kernel: Kernel) -> tuple[Op, ...]:
    """The operations from `start` on that a kernel understands and that can run as one, connected by their values."""
    if type(start.ops[0]) not in kernel.understands:
        return ()
    at = parts.index(start)
    chosen = [part for part in parts[at:] if part.run is None and type(part.ops[0]) in kernel.understands]
    while True:
        after = _depending(chosen, [part for part in parts if part not in chosen])
        late = [part for part in chosen if part.reads & after and part is not start]
        if not late:
            return tuple(part.ops[0] for part in _connected(start, chosen))
        chosen = [part for part in chosen if part not in late]


def _depending(chosen: Sequence[_Part], others: Sequence[_Part]) -> set[str]:
    """What the other parts make from what the chosen ones make, directly or not."""
    made = {name for part in chosen for name in part.makes}
    after: set[str] = set()
    while True:
        new = {name for part in others if part.reads & (made | after) for name in part.makes} - after
        if not new:
            return after
        after |= new


def _connected(start: _Part, chosen: Sequence[_Part]) -> list[_Part]:
    """Those of the chosen parts that are joined to `start` through values made among them."""
    joined = [start]
    for part in joined:
        joined += [p for p in chosen if p not in joined and (p.reads & part.makes or part.reads & p.makes)]
    return [part for part in chosen if part in joined]


def _in_order(parts: Sequence[_Part]) -> Iterator[_Part]:
    """Parts so that each comes after those whose values it reads."""
    waiting = list(parts)
    while waiting:
        unmade = {name for part in waiting for name in part.makes}
        ready = next(part for part in waiting if not part.reads & unmade)
        waiting.remove(ready)
        yield ready


def _segment(ops: tuple[Op, ...], plan: Plan) -> Segment:
    made = [name for op in ops for name in op.makes]
    read = dict.fromkeys(name for op in ops for name in op.reads if name not in made)
    inside = {*ops}
    needed = {name for op in plan.ops if op not in inside for name in op.reads} | {*plan.returns}
    return Segment(ops, tuple(read), tuple(name for name in made if name in needed))


def _by_definition(op: Op) -> Run:
    def run(values: Mapping[str, Array]) -> Mapping[str, Array]:
        return op.evaluate(values)

    return run


class Constants:
    """The values of a plan that are known at planning, on the device, made when they are first read.

    The same operation gives the same array to every plan on a device, for as long as one of them is there.
    """

    def __init__(self, plan: Plan, backend: Backend, device: Device) -> None:
        self._plan, self._backend, self._device = plan, backend, device
        self._held: dict[str, _Shared] = {}

    def __call__(self, name: str) -> Array:
        """The array of that name.

        Raises:
            KeyError: it is not a constant.
        """
        held = self._held.get(name)
        if held is None:
            op = self._plan.maker(name)
            if op is None or op.reads:
                raise KeyError(name)
            field = next(field for field, made in op.results.items() if made == name)
            key = (self._backend, str(self._device), _anonymous(op), field)
            held = _shared.get(key)
            if held is None:
                array = op.evaluate({})[name]
                native = self._backend.to_native(self._backend.from_host(np.ascontiguousarray(array), self._device))
                held = _shared[key] = _Shared(native)
            self._held[name] = held
        return held.array


class _Shared:
    """An array that a weak dictionary can hold, whatever its library."""

    __slots__ = ("__weakref__", "array")

    def __init__(self, array: Array) -> None:
        self.array = array


_shared: WeakValueDictionary[Any, _Shared] = WeakValueDictionary()


def _anonymous(op: Op) -> tuple[Any, ...]:
    """What an operation without operands computes, whatever its values are called."""
    return (type(op), *(getattr(op, name) for name in signature(type(op)).attributes))
