"""Plan: one attention call as a straight-line program of operations, printable like a jaxpr and storable as JSON.

A plan is static: it knows shapes, the token layout and the operations, never a tensor. What changes from call to call
(a mask, row quotas, lengths of padded samples) is an operand that is given at call time. Programs that `plan()` would
not write are as good as others: what is checked is that every operation fits the values it reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from rainfusion.core.checks import as_instance, shown
from rainfusion.core.errors import PlanFormatError, PolicyError, RainfusionError
from rainfusion.core.layout import BlockedAxis, TokenLayout
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops import AllBlocks, Attend, AttendMeans, BlockScore, Op, Select, ValueType
from rainfusion.core.ops.base import from_dict, refuse_much_data, value_name
from rainfusion.core.policies import Policy
from rainfusion.core.problem import AttentionProblem

PLAN_VERSION = 2
INPUTS = ("%q", "%k", "%v")
GIVEN = (*INPUTS, "%mask", "%quotas", "%kv_lengths", "%qb", "%kb", "%vb", "%score")
"""The values a plan may read without making them, which are then given at call time."""

_MOST_OPS = 1000
AnyOp = TypeVar("AnyOp", bound=Op)


@dataclass(frozen=True)
class Plan:
    """What one attention call computes, for every backend alike.

    Args:
        problem: shapes, dtype and scale of the tensors.
        layout: the order in which their tokens stand in blocks.
        ops: the program; every value is made once, before it is read.
        returns: the values a call returns.

    Raises:
        PlanFormatError: a value that is read but neither made nor one of those that can be given, made twice, or of
            another type than the operation reads; arguments of other types.

    Make one with `rainfusion.plan`; `print` shows it.
    """

    problem: AttentionProblem
    layout: TokenLayout
    ops: tuple[Op, ...]
    returns: tuple[str, ...]

    def __post_init__(self) -> None:
        as_instance(self.problem, AttentionProblem, "problem", PlanFormatError)
        as_instance(self.layout, TokenLayout, "layout", PlanFormatError)
        _check_tuple(self.ops, Op, "ops", "operations")
        _check_tuple(self.returns, str, "returns", "names of values")
        if len(self.ops) > _MOST_OPS:
            raise PlanFormatError(f"a plan of {len(self.ops)} operations; at most {_MOST_OPS} are allowed")
        unknown = [name for name in self.returns if name not in self.types]
        if unknown or not self.returns:
            raise PlanFormatError(f"returns is {list(self.returns)}; name values of the plan: {', '.join(self.types)}")

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:  # without what was derived: hashes differ between processes
        return Plan, tuple(getattr(self, f.name) for f in fields(self))

    @cached_property
    def _hash(self) -> int:
        return hash((self.problem, self.layout, self.ops, self.returns))

    # -- values ------------------------------------------------------------------------------------

    @cached_property
    def types(self) -> Mapping[str, ValueType]:
        """The type of every value, given ones first.

        Raises:
            PlanFormatError: as the class says.
        """
        possible = given_types(self)
        types = {name: possible[name] for name in self._read_before_made() if name in possible}
        for op in self.ops:
            missing = [name for name in op.reads if name not in types]
            if missing:
                raise PlanFormatError(f"`{op}` reads {missing[0]}, which nothing before it makes")
            made = op.infer({field: types[name] for field, name in op.operands.items()})
            for field, name in op.results.items():
                if name in types:
                    raise PlanFormatError(f"`{op}` makes {name} a second time")
                types[value_name(name)] = made[field]
        return types

    def _read_before_made(self) -> Iterator[str]:
        made: set[str] = set()
        for op in self.ops:
            yield from (name for name in op.reads if name not in made)
            made.update(op.makes)
        yield from (name for name in self.returns if name not in made)

    @cached_property
    def given(self) -> tuple[str, ...]:
        """The values that a call must give, out of `GIVEN`."""
        read = {*self._read_before_made()}
        return tuple(name for name in GIVEN if name in read)

    def takes(self, name: str) -> bool:
        """Whether a value is given at call time."""
        return isinstance(name, str) and name in self.given

    def maker(self, name: str | None) -> Op | None:
        """The operation that makes a value; None where it is given or absent."""
        return self._makers.get(name) if isinstance(name, str) else None

    @cached_property
    def _makers(self) -> dict[str, Op]:
        return {name: op for op in self.ops for name in op.makes}

    def find(self, kind: type[AnyOp]) -> AnyOp | None:
        """The first operation of a type; None where the plan has none.

        Raises:
            PlanFormatError: `kind` is no type of operations.
        """
        if not isinstance(kind, type) or not issubclass(kind, Op):
            raise PlanFormatError(f"kind={shown(kind)} is no type of operations; give one of rainfusion.ops")
        return next((op for op in self.ops if isinstance(op, kind)), None)

    def constant(self, name: str | None) -> np.ndarray | None:
        """A value known at planning, on the host; None where it depends on the call, or where `name` is None."""
        op = self.maker(name)
        if op is None or op.reads or name is None:
            return None
        array: np.ndarray = op.evaluate({})[name]
        return array

    # -- facts -------------------------------------------------------------------------------------

    @cached_property
    def q_axis(self) -> BlockedAxis:
        """The query side in blocks."""
        return self.layout.axis(self.problem.q_len, 0)

    @cached_property
    def kv_axis(self) -> BlockedAxis:
        """The key side in blocks."""
        return self.layout.axis(self.problem.kv_len, 1)

    @property
    def block(self) -> tuple[int, int]:
        """Tokens in a query block and in a key block."""
        return self.layout.block

    @cached_property
    def is_dense(self) -> bool:
        """Whether every block pair is attended, so that nothing is selected."""
        return self.mask_name is None or isinstance(self.maker(self.mask_name), AllBlocks)

    @cached_property
    def summarises(self) -> bool:
        """Whether omitted blocks count through their means."""
        return self.find(AttendMeans) is not None

    @cached_property
    def mask_name(self) -> str | None:
        """The mask that is attended by, or where nothing attends, the one that is made; None for dense attention."""
        attend = self.find(Attend)
        if attend is not None:
            return attend.mask
        maker = self.find(Select) or self.find(AllBlocks)
        return None if maker is None else maker.mask

    @cached_property
    def row_counts(self) -> np.ndarray | None:
        """Kept key blocks of every query block, int64 ``[heads or 1, q blocks]``, where planning knows them."""
        return self.counts_of(self.mask_name)

    def counts_of(self, mask: str | None) -> np.ndarray | None:
        """Kept key blocks of every query block under a mask (None: dense), where planning knows them."""
        q, kv, maker = self.q_axis, self.kv_axis, self.maker(mask)
        if mask is None or isinstance(maker, AllBlocks):
            return np.full((1, q.blocks), kv.blocks)
        if not isinstance(maker, Select) or maker.mass is not None or maker.over != "free":
            return None
        quotas = self.constant(maker.quotas)
        if quotas is None:
            return None
        q, kv = maker.q, maker.kv
        counts = np.full((quotas.shape[0], q.blocks), kv.blocks)
        counts[:, : q.free_blocks] = np.clip(quotas, 0, kv.free_blocks) + (kv.blocks - kv.free_blocks)
        counts.flags.writeable = False
        return counts

    @cached_property
    def density(self) -> float | None:
        """Exact share of block pairs that are attended; None where only the data can tell."""
        if self.row_counts is None:
            return None
        return int(self.row_counts.sum()) / (self.row_counts.size * self.kv_axis.blocks)

    @property
    def sparsity(self) -> float | None:
        """``1 - density``."""
        return None if self.density is None else 1.0 - self.density

    @cached_property
    def free_blocks_a_row(self) -> float | None:
        """Unprotected key blocks an unprotected query block keeps, on average; None where only the data can tell."""
        q, kv = self.q_axis, self.kv_axis
        if self.row_counts is None or self.is_dense or not q.free_blocks:
            return None
        return float(self.row_counts[:, : q.free_blocks].mean()) - (kv.blocks - kv.free_blocks)

    @cached_property
    def protected_share(self) -> float | None:
        """Share of the kept block pairs that are kept because they are protected; None where only the data can tell."""
        if self.density is None:
            return None
        q, kv = self.q_axis, self.kv_axis
        pairs = q.blocks * kv.blocks
        return (pairs - q.free_blocks * kv.free_blocks) / (self.density * pairs)

    @property
    def flops(self) -> int | None:
        """Predicted floating-point operations: kept block pairs, block scores and summary rows; None as `density`."""
        if self.density is None:
            return None
        p, q, kv = self.problem, self.q_axis, self.kv_axis
        pair = 2 * p.batch * p.heads * p.head_dim
        scores = pair * q.blocks * kv.blocks if self.find(BlockScore) else 0
        omitted = q.blocks * kv.blocks * (1 - self.density)
        summary = round(2 * pair * omitted * q.block) if self.summarises else 0
        attended = round(p.dense_flops * self.density) if self.find(Attend) else 0
        return attended + scores + summary

    def accepts(self, mask: BlockMask) -> bool:
        """Whether a mask fits this plan: its problem's sizes, blocks, and token order where that is known."""
        return isinstance(mask, BlockMask) and self.objection(mask) is None

    def objection(self, mask: BlockMask) -> str | None:
        """Why a mask does not fit this plan; None where it does."""
        if not isinstance(mask, BlockMask):
            return f"the mask is a {type(mask).__name__}; give a BlockMask"
        p = self.problem
        needed = (p.batch, p.heads, self.q_axis.blocks, self.kv_axis.blocks)
        given = (tuple(mask.blocks.shape), mask.q_len, mask.kv_len, tuple(mask.block))
        if given != (needed, p.q_len, p.kv_len, self.block):
            return (
                f"the mask is of another problem: {mask!r}; this plan needs batch={p.batch}, heads={p.heads}, "
                f"{needed[2]}x{needed[3]} blocks of {self.block} over {p.q_len}x{p.kv_len} tokens"
            )
        if mask.layout not in (None, self.layout):
            return (
                f"the mask's blocks are in another order: it was made for {_told(mask.layout)}; this plan is "
                f"for {_told(self.layout)}; give the same grid, text, window and sink"
            )
        return None

    def quotas(self, policy: Policy) -> np.ndarray:
        """Row quotas of a policy for this plan's shapes, int32 ``[heads or 1, unprotected q blocks]``, to be given at
        call time.

        Raises:
            PolicyError: a policy whose budget is not a number of blocks alone.
        """
        if not isinstance(policy, Policy):
            raise PolicyError(f"policy={shown(policy)} is not a policy; give TopK(...)")
        budget = policy.budget(self.q_axis, self.kv_axis, self.problem.heads)
        if budget is None or budget.mass is not None or budget.over != "free":
            raise PolicyError(f"{policy} is more than a number of blocks a row; give TopK")
        quotas: np.ndarray = np.clip(budget.quotas, 0, self.kv_axis.free_blocks).astype(np.int32)
        return quotas

    # -- text --------------------------------------------------------------------------------------

    @cached_property
    def key(self) -> str:
        """A digest of the whole program: plans with equal keys compute the same."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __str__(self) -> str:
        lines = [f"plan v{PLAN_VERSION}   {self.problem}   {self.layout}   {self._share()}"]
        names = [", ".join(op.makes) for op in self.ops]
        width = max(map(len, names), default=0)
        lines += [f"  given {' '.join(self.given)}"]
        lines += [f"  {name:<{width}} = {op}" for name, op in zip(names, self.ops, strict=True)]
        lines += [f"  return {' '.join(self.returns)}"]
        return "\n".join(lines)

    def _share(self) -> str:
        if self.mask_name is None:
            return "dense"
        if self.density is None:
            return "density=data"
        text = f"density={self.density:.4f}"
        if self.free_blocks_a_row is not None and self.find(Select):
            text += f"   {self.free_blocks_a_row:.4g} free blocks a row   protected={self.protected_share:.2f}"
        return text

    def to_json(self) -> str:
        """The program as versioned JSON; `from_json` reads it back."""
        record = {
            "rainfusion_plan": PLAN_VERSION,
            "problem": asdict(self.problem),
            "layout": self.layout.to_dict(),
            "ops": [op.to_dict() for op in self.ops],
            "returns": self.returns,
        }
        return json.dumps(record, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back; every operation is checked, and no code is run.

        Raises:
            PlanFormatError: not a plan, another version, or operations that are unknown or do not fit each other.
        """
        try:
            record = json.loads(text)
            version = record["rainfusion_plan"]
            if version != PLAN_VERSION:
                raise PlanFormatError(f"plan format {version!r} is not known; this rainfusion reads {PLAN_VERSION}")
            unknown = {*record} - {"rainfusion_plan", "problem", "layout", "ops", "returns"}
            if unknown:
                raise PlanFormatError(f"a plan has no {', '.join(sorted(map(str, unknown)))}")
            refuse_much_data(record["ops"][: _MOST_OPS + 1])
            return cls(
                AttentionProblem(**record["problem"]),
                TokenLayout.from_dict(record["layout"]),
                tuple(from_dict(op) for op in record["ops"][: _MOST_OPS + 1]),
                tuple(value_name(name) for name in record["returns"]),
            )
        except PlanFormatError:
            raise
        except (RainfusionError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise PlanFormatError(f"not a rainfusion plan: {type(error).__name__}: {error}") from error


def _told(layout: TokenLayout) -> str:
    """A layout in words, with what its short form leaves out."""
    grids = [f"window {grid.window}, sink {grid.sink}" for grid in layout.grids]
    return f"{layout} ({'; '.join(grids)})" if grids else str(layout)


def _check_tuple(values: Any, kind: type, name: str, what: str) -> None:
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
        raise PlanFormatError(f"{name}={shown(values)} is not a tuple of {what}")


def given_types(plan: Plan) -> dict[str, ValueType]:
    """The types of the values that can be given to a plan; tensors in ``[batch, heads, tokens, channels]``."""
    p, q, kv = plan.problem, plan.q_axis, plan.kv_axis
    wide = "float64" if p.dtype == "float64" else "float32"
    keys, means = (p.batch, p.kv_heads, p.kv_len, p.head_dim), (p.batch, p.kv_heads, kv.blocks, p.head_dim)
    grid = (p.batch, p.heads, q.blocks, kv.blocks)
    return {
        "%q": ValueType((p.batch, p.heads, p.q_len, p.head_dim), p.dtype),
        "%k": ValueType(keys, p.dtype),
        "%v": ValueType(keys, p.dtype),
        "%mask": ValueType(grid, "bool"),
        "%quotas": ValueType((p.heads, q.free_blocks), "int32"),
        "%kv_lengths": ValueType((p.batch,), "int32"),
        "%qb": ValueType((p.batch, p.heads, q.blocks, p.head_dim), wide),
        "%kb": ValueType(means, wide),
        "%vb": ValueType(means, wide),
        "%score": ValueType(grid, wide),
    }
