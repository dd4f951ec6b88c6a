"""Executable: a plan lowered for one device, to be called with tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from array_api_compat import array_namespace

from rainfusion.core import blame
from rainfusion.core.arrays import array_facts, dtype_name, how_to_pass, library_name, shape_of
from rainfusion.core.backend import Backend, Device, Run, Segment
from rainfusion.core.checks import shown
from rainfusion.core.errors import MaskError, ProblemError
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import ValueType
from rainfusion.core.plan import GIVEN, INPUTS, Plan, given_types

Array = Any
DEFINITION = "definition"
"""What runs a step that no kernel takes."""

_ARGUMENTS = {name: name.removeprefix("%") for name in GIVEN}
_LARGEST = np.iinfo(np.int32).max
_MOST_ACCEPTED = 32  # kinds of arguments that an executable knows to fit


_serials = count()
live: WeakValueDictionary[str, Executable] = WeakValueDictionary()
"""Every executable of this process by its serial: for tracers, which can tell texts apart but no objects."""


@dataclass(frozen=True)
class Step:
    """A segment and the function that runs it; `by` names the backend, or ``definition``."""

    segment: Segment
    run: Run = field(repr=False)
    by: str

    def __str__(self) -> str:
        how = getattr(self.run, "how", "")
        return f"{self.by:<10} {' + '.join(op.name for op in self.segment.ops)}{how and f'  ({how})'}"


class Values(dict[str, Array]):
    """The values of one call by name; constants are looked up where they are read."""

    def __init__(self, constants: Callable[[str], Array]) -> None:
        super().__init__()
        self._constants = constants

    def __missing__(self, name: str) -> Array:
        return self._constants(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As for any mapping, constants included."""
        try:
            return self[name]
        except KeyError:
            return default


@dataclass(frozen=True, eq=False)
class Executable:
    """A plan lowered for one device: call it with q, k, v. `print` shows who runs what.

    Thread-safe: a call writes nothing that another call reads.
    """

    plan: Plan
    backend: Backend
    device: Device
    steps: tuple[Step, ...]
    constants: Callable[[str], Array] = field(repr=False)
    restore: Callable[..., tuple[Any, ...]] | None = field(default=None, repr=False)
    serial: str = field(init=False, repr=False)
    _accepted: set[tuple[Any, ...]] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "serial", f"executable {next(_serials)}")
        live[self.serial] = self

    def __call__(
        self,
        q: Array = None,
        k: Array = None,
        v: Array = None,
        *,
        mask: BlockMask | None = None,
        quotas: Array = None,
        kv_lengths: Array = None,
        **means: Array,
    ) -> Any:
        """Run the plan.

        Args:
            q, k, v: arrays of the shapes and dtype that were planned, on this executable's device; those that the
                plan reads.
            mask: the block mask, where the plan reads one.
            quotas: unprotected key blocks that every unprotected query row keeps, int ``[heads or 1, rows]``, where
                the plan reads them; NumPy or on the device.
            kv_lengths: valid tokens in block order, int ``[batch]``, where the plan reads them; likewise.
            means: ``qb``, ``kb``, ``vb`` or ``score``, where the plan reads those.

        Returns:
            The plan's values: the output in the kind, dtype, device and tensor layout of `q`; a tuple in the order of
            ``plan.returns`` where there are several.

        Raises:
            ProblemError: other tensors than were planned.
            MaskError: a mask where none is read, none where one is, or one of another problem.
        """
        arguments = {"q": q, "k": k, "v": v, "mask": mask, "quotas": quotas, "kv_lengths": kv_lengths, **means}
        tracer = _tracer()
        if tracer is not None:
            return tracer(self, arguments)
        return self.run(arguments)

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """Check the arguments, by name and None where absent, and run the plan."""
        self.check(arguments)
        return self.compute(arguments)

    def compute(self, arguments: Mapping[str, Any]) -> Any:
        """Run the plan on arguments that `check` has accepted."""
        try:
            return self._compute(arguments)
        except BaseException as error:
            named = blame.blamed(self.backend, "run", error)
            if named is error:
                raise
            raise named from error

    def _compute(self, arguments: Mapping[str, Any]) -> Any:
        backend, plan = self.backend, self.plan
        values = Values(self.constants)
        with backend.running(self.device):
            for name in plan.given:
                values[name] = self._native(name, arguments[_ARGUMENTS[name]])
            device = getattr(next(iter(values.values()), None), "device", None)
            marked = blame.marks(values.items()) if self._is_foreign else ()
            for step, due in zip(self.steps, self._due_of_steps, strict=True):
                made = step.run(values)
                if due:
                    blame.check_made(backend, made, due, device)
                values.update(made)
            if marked:
                blame.check_unwritten(backend, marked)
        like = next((value for value in arguments.values() if value is not None), None)
        results = tuple(self._result(name, values, like, arguments) for name in plan.returns)
        return results[0] if len(results) == 1 else results

    @cached_property
    def _is_foreign(self) -> bool:
        return blame.is_foreign(self.backend)

    @cached_property
    def _due_of_steps(self) -> tuple[blame.Due, ...]:
        """What every step has to make; nothing is asked of definitions."""
        return tuple(
            () if step.by == DEFINITION else blame.due_of(step.segment, self.plan.types) for step in self.steps
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.restore is None:
            raise TypeError("this executable was lowered by hand; pickle its plan, or lower with rainfusion.lower")
        return self.restore, (self.plan, self.backend.name, str(self.device))

    def __str__(self) -> str:
        lines = [f"{self.backend.name} on {self.device}"]
        return "\n".join(lines + [f"  {step}" for step in self.steps])

    # -- values in and out -------------------------------------------------------------------------

    def _native(self, name: str, given: Any) -> Array:
        backend = self.backend
        if name in INPUTS:
            return swap_if_bshd(backend.to_native(given), self.plan.problem.tensor_layout)
        if name == "%mask":
            return backend.to_native(given.blocks)
        if isinstance(given, np.ndarray | list | tuple | int) and name in ("%quotas", "%kv_lengths"):
            array = np.clip(given, -1, _LARGEST).astype(np.int32)  # clamped, as on a device, and never wrapped around
            given = backend.from_host(array, self.device)
        native = backend.to_native(given)
        if name == "%quotas" and native.ndim == 1:
            native = native[None, :]
        return native

    def _result(self, name: str, values: Values, like: Array, arguments: Mapping[str, Any]) -> Any:
        plan, value = self.plan, values[name]
        if name == "%mask" and arguments.get("mask") is not None:
            return arguments["mask"]
        kind = plan.types[name]
        if kind == self._mask_type:
            if self._is_constant(name):  # the caller may write into what it gets, and the next call reads this
                value = array_namespace(value).asarray(value, copy=True)
            return self._mask(self._to_caller(name, value, like, ValueType(kind.shape, "bool")))
        if name == "%out":
            value = swap_if_bshd(value, plan.problem.tensor_layout)
            return self._to_caller(name, value, like, ValueType(plan.problem.q_shape, plan.problem.dtype))
        return self._to_caller(name, value, like, kind)

    def _to_caller(self, name: str, value: Array, like: Any, kind: ValueType) -> Array:
        like = self._host_like(like)
        result = self.backend.from_native(value, like, kind.dtype)
        blame.check_result(self.backend, name, result, like, kind)
        return result

    def _mask(self, blocks: Array) -> BlockMask:
        problem = self.plan.problem
        return BlockMask._trusted(blocks, problem.q_len, problem.kv_len, self.plan.block, self.plan.layout)

    @cached_property
    def _mask_type(self) -> ValueType:
        return given_types(self.plan)["%mask"]

    def _is_constant(self, name: str) -> bool:
        op = self.plan.maker(name)
        return op is not None and not op.reads

    @staticmethod
    def _host_like(like: Any) -> Array:
        return like.blocks if isinstance(like, BlockMask) else like

    # -- checks ------------------------------------------------------------------------------------

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Refuse arguments that are not what the plan reads.

        Raises:
            ProblemError, MaskError: as `__call__` says; no mapping from names.
        """
        if not isinstance(arguments, Mapping):
            raise ProblemError(f"arguments={shown(arguments)} is no mapping; give arrays by name, such as q, k and v")
        facts = (*arguments, *map(array_facts, arguments.values()))
        try:
            accepted = facts in self._accepted
        except TypeError:  # not arrays, but something with a shape that cannot be compared
            self._check_all(arguments)
            return
        if accepted:  # tensors of one kind are looked at once
            self.check_operands(arguments)
            return
        self._check_all(arguments)
        if len(self._accepted) < _MOST_ACCEPTED:
            self._accepted.add(facts)

    def _check_all(self, arguments: Mapping[str, Any]) -> None:
        given = {name for name, value in arguments.items() if value is not None}
        due = self._due
        for name in sorted(given - due - {"q", "k", "v"}):
            kind = MaskError if name == "mask" else ProblemError
            raise kind(f"{name} is given, but this plan does not read it; {self._how_to_read(name)}")
        if "mask" in due - given:
            self._check_mask(None)
        for name in sorted(due - given):
            raise ProblemError(f"{name} is missing; this plan reads {', '.join(sorted(due))}")
        first = arguments[self._tensors[0]] if self._tensors else None
        for name in self._tensors:
            self._check_tensor(name, arguments[name], first)
        for name in due & {"qb", "kb", "vb", "score"}:
            self._check_means(name, arguments[name])
        self.check_operands(arguments)

    def check_operands(self, arguments: Mapping[str, Any]) -> None:
        """Refuse what may differ between calls whose tensors are of one kind: as `check`, without shapes of tensors."""
        given = [arguments[name] for name in self._tensors]
        if "mask" in self._due:
            self._check_mask(arguments["mask"])
            given.append(arguments["mask"].blocks)
        for name in ("quotas", "kv_lengths"):
            if name in self._due:
                self._check_numbers(name, arguments[name])
                given.append(arguments[name])
        try:
            self.backend.check_inputs(*given)
        except Exception as error:
            raise blame.blamed(self.backend, "run", error) from error.__cause__

    @cached_property
    def _tensors(self) -> tuple[str, ...]:
        return tuple(name for name in ("q", "k", "v") if name in self._due)

    @cached_property
    def _due(self) -> frozenset[str]:
        return frozenset(_ARGUMENTS[name] for name in self.plan.given)

    @staticmethod
    def _how_to_read(name: str) -> str:
        return {
            "mask": "plan with Fixed() to give one",
            "quotas": "plan with quotas=True to give them",
            "kv_lengths": "plan with kv_lengths=True to give them",
        }.get(name, "leave it out")

    def _check_tensor(self, name: str, x: Array, first: Array) -> None:
        problem = self.plan.problem
        shape = problem.q_shape if name == "q" else problem.kv_shape
        given = shape_of(x)
        if given != shape or dtype_name(x) != problem.dtype:
            raise ProblemError(f"{name} is {given} {dtype_name(x)}; this plan takes {shape} {problem.dtype}")
        if type(x) is not type(first) and library_name(x) != library_name(first):
            raise ProblemError(
                f"{self._tensors[0]} is a {library_name(first)} array and {name} a {library_name(x)} one; give one kind"
            )
        self._check_home(name, x, ProblemError)

    def _check_home(self, name: str, x: Array, error: type[Exception]) -> None:
        home = self.backend.device_of(x)
        if home is None or str(home) != str(self.device):
            where = f"not an array of its kind{how_to_pass(x)}" if home is None else f"on {home}"
            raise error(
                f"{name} ({type(x).__name__}) is {where}; this plan was lowered for {self.backend.name} on "
                f"{self.device}. Move all arrays to one device, or lower the plan for theirs"
            )

    def _check_mask(self, mask: Any) -> None:
        """Refuse a mask that does not fit the plan or lives on another device, with a MaskError."""
        if not isinstance(mask, BlockMask):
            raise MaskError(
                f"mask is a {type(mask).__name__} where a BlockMask is due; make one with BlockMask.from_bool, "
                "from_kv_indices, from_dense or load"
            )
        objection = self.plan.objection(mask)
        if objection:
            raise MaskError(objection)
        home = self.backend.device_of(mask.blocks)
        if home is None or str(home) != str(self.device):
            raise MaskError(f"the mask lives elsewhere than the tensors ({self.device}); bring it with mask.like(q)")

    def _check_numbers(self, name: str, given: Any) -> None:
        """Refuse quotas or lengths of another shape or kind; values are clamped, never looked at on a device."""
        shape = self.plan.types[f"%{name}"].shape
        allowed = (shape,) if name == "kv_lengths" else (shape, (1, shape[1]), (shape[1],))
        if isinstance(given, list | tuple | int):
            given = _as_array(given)
        found, dtype = shape_of(given), dtype_name(given)
        if found not in allowed or not dtype.startswith(("int", "uint")):
            what = shown(given) if found is None else f"{dtype} {found}"
            raise ProblemError(f"{name} is {what}; give integers {list(allowed[0])}")
        if not isinstance(given, np.ndarray):
            self._check_home(name, given, ProblemError)

    def _check_means(self, name: str, x: Array) -> None:
        kind = self.plan.types[f"%{name}"]
        if shape_of(x) != kind.shape or dtype_name(x) != kind.dtype:
            raise ProblemError(f"{name} is {dtype_name(x)} {shape_of(x)}; this plan takes {kind}")
        self._check_home(name, x, ProblemError)


def _as_array(numbers: Any) -> np.ndarray:
    """A list of numbers as an array; one of objects where they make none."""
    try:
        return np.asarray(numbers)
    except Exception:  # rows of several lengths, an item that fails
        return np.empty(0, object)


def swap_if_bshd(x: Array, tensor_layout: str) -> Array:
    """A view with the head and token axes swapped where the caller keeps them the other way round."""
    if tensor_layout == "bhsd":
        return x
    return array_namespace(x).permute_dims(x, (0, 2, 1, 3))


Tracer = Callable[[Executable, Mapping[str, Any]], Any]
tracers: list[Callable[[], Tracer | None]] = []
"""Asked at every call for a function that records the call into a graph instead of making it; None to make it."""


def _tracer() -> Tracer | None:
    if "torch" not in sys.modules:
        return None
    return next((found for ask in tracers if (found := ask()) is not None), None)
