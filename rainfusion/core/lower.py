"""lower(): a plan and a backend's kernels become an Executable.

At every operation the longest kernel that takes it wins; what no kernel takes runs by its semantics on
the backend's own arrays. Operations without dynamic inputs are computed here, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from array_api_compat import array_namespace

from rainfusion.core import semantics
from rainfusion.core.backend import Backend, Device, Segment
from rainfusion.core.errors import LoweringError, MaskError, ProblemError
from rainfusion.core.ir import INPUTS, Op, Plan
from rainfusion.core.mask import BlockMask
from rainfusion.core.problem import dtype_name

Array = Any
Run = Callable[..., tuple[Array, ...]]


@dataclass(frozen=True)
class Step:
    """A segment and the function that runs it; `by` names the backend or ``semantics``."""

    segment: Segment
    run: Run = field(repr=False)
    by: str

    def __str__(self) -> str:
        how = getattr(self.run, "how", "")
        return f"{self.by:<10} {' + '.join(op.name for op in self.segment.ops)}{how and f'  ({how})'}"


EXECUTABLES: WeakValueDictionary[str, Executable] = WeakValueDictionary()
"""Every executable there is, by its key: for graphs, which can hold text but no Python object."""


@dataclass(frozen=True, eq=False)
class Executable:
    """A plan lowered for one device: call it with q, k, v. `print` shows who runs what.

    Thread-safe: a call writes nothing that another call reads.

    Attributes:
        key: what it is, as text: backend, device and plan. Equal keys compute the same.
    """

    plan: Plan
    backend: Backend
    device: Device
    constants: dict[str, Array] = field(repr=False)
    steps: tuple[Step, ...]
    key: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        key = json.dumps([self.backend.name, str(self.device), self.plan.to_json()])
        object.__setattr__(self, "key", key)
        EXECUTABLES[key] = self

    def __call__(self, q: Array, k: Array, v: Array, *, mask: BlockMask | None = None) -> Any:
        """Run the plan.

        Args:
            q, k, v: arrays of the shapes and dtype that were planned, on this executable's device.
            mask: the block mask, exactly where the plan's policy is `Fixed`.

        Returns:
            The output, in the kind, dtype, device and tensor layout of `q`; a tuple in the order
            ``(out, lse, mask)`` where the plan returns more than the output.

        Raises:
            ProblemError: other tensors than were planned.
            MaskError: a mask where none is due, none where one is, or one of another problem.
        """
        recorded = self.backend.record(self, q, k, v, mask)
        return self.run(q, k, v, mask) if recorded is None else recorded

    def run(self, q: Array, k: Array, v: Array, mask: BlockMask | None = None) -> Any:
        """Run the plan here and now, whoever may be recording calls."""
        values = dict(self.constants)
        self._check_tensors(q, k, v)
        self.backend.check_inputs(q, k, v)
        for name, x in zip(INPUTS, (q, k, v), strict=True):
            values[name] = _swap_if_bshd(self.backend.to_native(x), self.plan)
        self._check_mask(mask)
        if mask is not None:
            values["%mask"] = self.backend.to_native(mask.blocks)
        with self.backend.running(self.device):
            for step in self.steps:
                outs = step.run(*(values[name] for name in step.segment.inputs))
                values.update(zip(step.segment.outputs, outs, strict=True))
        results = tuple(self._result(name, values[name], q, mask) for name in self.plan.returns)
        return results[0] if len(results) == 1 else results

    def _result(self, name: str, value: Array, q: Array, mask: BlockMask | None) -> Any:
        problem = self.plan.problem
        if name == "%out":
            return self.backend.from_native(_swap_if_bshd(value, self.plan), q, problem.dtype)
        if name == "%lse":
            dtype = "float64" if problem.dtype == "float64" else "float32"
            return self.backend.from_native(value, q, dtype)
        if mask is not None:
            return mask
        if name in self.constants:  # the caller may write into what it gets, and the next call reads this
            value = array_namespace(value).asarray(value, copy=True)
        blocks = self.backend.from_native(value, q, "bool")
        return BlockMask(blocks, problem.q_len, problem.kv_len, self.plan.block, self.plan.layout).vouched()

    def _check_tensors(self, q: Array, k: Array, v: Array) -> None:
        problem = self.plan.problem
        for name, x, shape in (("q", q, problem.q_shape), ("k", k, problem.kv_shape), ("v", v, problem.kv_shape)):
            given = tuple(getattr(x, "shape", ()))
            if given != shape or dtype_name(x) != problem.dtype:
                raise ProblemError(f"{name} is {given} {dtype_name(x)}; this plan takes {shape} {problem.dtype}")
            if type(x) is not type(q) and _library(x) != _library(q):
                raise ProblemError(f"q is a {_library(q)} array and {name} a {_library(x)} one; give one kind")
            home = self.backend.device_of(x)
            if home is None or str(home) != str(self.device):
                where = "not an array of its kind" if home is None else f"on {home}"
                raise ProblemError(
                    f"{name} ({type(x).__name__}) is {where}; this plan was lowered for {self.backend.name} "
                    f"on {self.device}. Move all tensors to one device, or lower the plan for theirs"
                )

    def _check_mask(self, mask: BlockMask | None) -> None:
        if not self.plan.mask_is_input:
            if mask is not None:
                raise MaskError(f"policy {self.plan.policy} makes its own mask; plan with Fixed() to give one")
            return
        if not isinstance(mask, BlockMask):
            raise MaskError(
                f"mask is a {type(mask).__name__} where a BlockMask is due (policy fixed); make one with "
                "BlockMask.from_bool, from_kv_indices, from_dense or load"
            )
        p, plan = self.plan.problem, self.plan
        needed = (p.batch, p.heads, plan.q_axis.blocks, plan.kv_axis.blocks)
        given = (tuple(mask.blocks.shape), mask.q_len, mask.kv_len, tuple(mask.block))
        if given != (needed, p.q_len, p.kv_len, plan.block):
            raise MaskError(
                f"the mask is of another problem: {mask!r}; this plan needs batch={p.batch}, heads={p.heads}, "
                f"{needed[2]}x{needed[3]} blocks of {plan.block} over {p.q_len}x{p.kv_len} tokens"
            )
        if mask.layout not in (None, plan.layout):
            raise MaskError(
                f"the mask's blocks are in another order: it was made for {mask.layout}, window {mask.layout.window}; "
                f"this plan is for {plan.layout}, window {plan.layout.window}; give the same grid, text and window"
            )
        home = self.backend.device_of(mask.blocks)
        if home is None or str(home) != str(self.device):
            raise MaskError(f"the mask lives elsewhere than the tensors ({self.device}); bring it with mask.like(q)")
        mask.checked()

    def __str__(self) -> str:
        lines = [f"{self.backend.name} on {self.device}"]
        return "\n".join(lines + [f"  {step}" for step in self.steps])


def lower(plan: Plan, backend: Backend, device: Device, *, strict: bool = False) -> Executable:
    """Lower `plan` for `device`.

    Args:
        strict: forbid operations that no kernel of the backend takes.

    Raises:
        LoweringError: under `strict`, naming each such operation and what each kernel said.
    """
    constants = {op.outs[0]: _constant(op, plan, backend, device) for op in plan.ops if not op.args}
    steps = tuple(_steps(plan, backend, device, strict))
    return Executable(plan, backend, device, constants, steps)


def _steps(plan: Plan, backend: Backend, device: Device, strict: bool) -> Iterator[Step]:
    ops = tuple(op for op in plan.ops if op.args)
    kernels = sorted(backend.kernels(plan, device), key=lambda kernel: -len(kernel.covers))
    at = 0
    while at < len(ops):
        declined: list[str] = []
        for kernel in kernels:
            stop = at + len(kernel.covers)
            if tuple(op.name for op in ops[at:stop]) != kernel.covers:
                continue
            segment = _segment(ops, at, stop, plan)
            try:
                run = kernel.build(segment, plan, device)
            except LoweringError as reason:
                declined.append(f"{'+'.join(kernel.covers)}: {reason}")
                continue
            yield Step(segment, run, backend.name)
            break
        else:
            stop = at + 1
            if strict:
                said = "; ".join(declined) or "it offers none that starts here"
                raise LoweringError(
                    f"{backend.name} on {device} has no kernel for `{', '.join(ops[at].outs)} = {ops[at]}` ({said}); "
                    "lower with strict=False to run it by its semantics"
                )
            segment = _segment(ops, at, stop, plan)
            yield Step(segment, _by_semantics(segment, plan, backend, device), "semantics")
        at = stop


def _segment(ops: tuple[Op, ...], start: int, stop: int, plan: Plan) -> Segment:
    inside = ops[start:stop]
    made = [out for op in inside for out in op.outs]
    read = dict.fromkeys(name for op in inside for name in op.reads if name not in made)
    later = {name for op in ops[stop:] for name in op.reads} | set(plan.returns)
    return Segment(inside, tuple(read), tuple(out for out in made if out in later))


def _constant(op: Op, plan: Plan, backend: Backend, device: Device) -> Array:
    if op.name == "window_order":
        return _native(backend, plan.layout.order, device)
    if op.name == "all_blocks":
        shape = (plan.problem.batch, plan.problem.heads, *op["blocks"])
        return _native(backend, np.ones(shape, dtype=bool), device)
    raise LoweringError(f"operation {op.name} has neither inputs nor a meaning of its own")


def _native(backend: Backend, array: Any, device: Device) -> Array:
    return backend.to_native(backend.from_host(array, device))


def _by_semantics(segment: Segment, plan: Plan, backend: Backend, device: Device) -> Run:
    """A single operation as core.semantics defines it."""
    (op,) = segment.ops
    meaning = _MEANINGS[op.name](op, plan, lambda x: _native(backend, x, device))

    def run(*arrays: Array) -> tuple[Array, ...]:
        values = dict(zip(segment.inputs, arrays, strict=True))
        args = [None if a is None else ~values[a[1:]] if a.startswith("~") else values[a] for a in op.args]
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity spread as in dense attention
            result = meaning(*args)
        # attend and merge always make a log-sum-exp; `op.outs` may not ask for it.
        made = dict(zip(op.outs, result if isinstance(result, tuple) else (result,), strict=False))
        return tuple(made[name] for name in segment.outputs)

    return run


def _attend(op: Op, plan: Plan, constant: Callable[[np.ndarray], Array]) -> Callable[..., Any]:
    attrs = dict(op.attrs)
    dtype = np.float64 if plan.problem.dtype == "float64" else np.float32
    bias = constant(np.log(plan.kv_axis.counts).astype(dtype)) if "bias" in attrs else None
    block = attrs.get("block", plan.block)
    return lambda *args: semantics.attend(*args, block=block, scale=plan.problem.scale, bias=bias)


def _select(op: Op, plan: Plan, constant: Callable[[np.ndarray], Array]) -> Callable[..., Any]:
    policy, q, kv = plan.policy, plan.q_axis, plan.kv_axis
    known = constant(semantics.selection_constant(policy, q, kv))
    return lambda score: semantics.select(score, policy=policy, q=q, kv=kv, constant=known)


_MEANINGS: dict[str, Callable[..., Callable[..., Any]]] = {
    "block_mean": lambda op, plan, constant: lambda x, order: semantics.block_mean(x, order, block=op["block"]),
    "block_score": lambda op, plan, constant: lambda qb, kb: semantics.block_score(qb, kb, scale=op["scale"]),
    "select": _select,
    "attend": _attend,
    "merge": lambda op, plan, constant: semantics.merge,
}


def _library(x: Array) -> str:
    """The name of the array library of `x`; subclasses such as torch.nn.Parameter belong to their base's."""
    try:
        return str(array_namespace(x).__name__).removeprefix("array_api_compat.")
    except TypeError:
        return type(x).__module__.partition(".")[0]


def _swap_if_bshd(x: Array, plan: Plan) -> Array:
    """A view with the head and token axes swapped where the caller keeps them the other way round."""
    if plan.problem.tensor_layout == "bhsd":
        return x
    return array_namespace(x).permute_dims(x, (0, 2, 1, 3))
