"""A call: its settings, and how it is planned, prepared and run; shared by the public functions and graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rainfusion import dispatch
from rainfusion.core.arrays import array_facts
from rainfusion.core.checks import shown
from rainfusion.core.errors import ProblemError
from rainfusion.core.layout import TokenLayout
from rainfusion.core.plan import Plan
from rainfusion.core.planner import plan_with_notes
from rainfusion.core.policies import Fixed, Policy, TopK
from rainfusion.core.problem import AttentionProblem

Array = Any


class Settings(NamedTuple):
    """What a call says beside its tensors: the arguments of `attention` by the same names."""

    grid: tuple[int, int, int] | None = None
    text: int = 0
    text_position: str = "end"
    parts: tuple[Any, ...] | None = None
    sparsity: float | tuple[float, ...] | None = None
    policy: Policy | None = None
    block: int | tuple[int, int] = 128
    window: tuple[int, int, int] | None = None
    sink: str | tuple[str, ...] | None = "first_frame"
    omitted: str = "drop"
    order: str = "window"
    tensor_layout: str = "bhsd"
    scale: float | None = None
    precision: str | None = None
    rotate: bool = False

    def layout(self) -> TokenLayout:
        """The token layout that the settings describe."""
        return TokenLayout(
            self.grid, self.text, self.text_position, self.window, self.block, self.sink, parts=self.parts
        )

    def chosen_policy(self, given: Mapping[str, Any]) -> Policy:
        """The one policy that the settings and the operands given at call time name.

        Raises:
            ProblemError: two of them say what to attend.
        """
        says = {"sparsity": self.sparsity, "policy": self.policy, "mask": given["mask"], "quotas": given["quotas"]}
        named = [name for name, value in says.items() if value is not None]
        if "mask" in named and getattr(self.policy, "reads_mask", False):
            named.remove("policy")
        if "quotas" in named and self.policy is not None:
            named.remove("quotas")  # they replace the policy's own
        if len(named) > 1:
            raise ProblemError(f"{' and '.join(named)} both say what to attend; give one of them")
        if given["mask"] is not None:
            return Fixed()
        if self.policy is not None:
            return self.policy
        return TopK() if self.sparsity is None else TopK(self.sparsity)


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings by name.

    Raises:
        ProblemError: a name that `attention` does not have.
    """
    try:
        return Settings(**given)
    except TypeError:
        unknown = ", ".join([shown(name)[1:-1] for name in sorted({*given} - {*Settings._fields})[:3]])
        raise ProblemError(f"{unknown} is not an argument; choose from {', '.join(Settings._fields)}") from None


def call(arguments: Mapping[str, Any], settings: Settings, returns: tuple[str, ...], backend: str | None) -> Any:
    """Plan, choose and run a call here and now; what was settled for an equal one is taken up again.

    Args:
        arguments: q, k, v, mask, quotas and kv_lengths, None where absent.
    """
    key = _key(arguments, settings, returns, backend)
    prepared = dispatch.cache.call(key)
    if prepared is None:
        planned, notes = _planned(arguments, settings, returns)
        prepared = dispatch.prepare(planned, notes, like=arguments["q"], backend=backend)
        arguments = _of_use(arguments, planned)
        prepared.executable.check(arguments)
        dispatch.cache.remember(key, prepared)
        prepared.warn()
        return prepared.executable.compute(arguments)
    prepared.warn()
    executable = prepared.executable
    executable.check_operands(arguments)  # and never looks at what is of no use
    return executable.compute(arguments)


def _of_use(arguments: Mapping[str, Any], plan: Plan) -> Mapping[str, Any]:
    """The arguments without lengths that the plan does not read: a selection that keeps every block needs none."""
    return arguments if plan.takes("%kv_lengths") else {**arguments, "kv_lengths": None}


def _key(
    arguments: Mapping[str, Any], settings: Settings, returns: tuple[str, ...], backend: str | None
) -> tuple[Any, ...] | None:
    """All that planning and choosing depend on; None where some of it cannot be compared."""
    facts = tuple(array_facts(arguments[name]) for name in ("q", "k", "v"))
    given = tuple(arguments[name] is not None for name in ("mask", "quotas", "kv_lengths"))
    key = (facts, given, returns, dispatch.asked(backend), settings, tuple(map(type, settings)))
    try:
        hash(key)
    except Exception:  # lists and arrays have no hash, and that of a caller's class may fail in its own way
        return None
    return key


def _planned(
    arguments: Mapping[str, Any], settings: Settings, returns: tuple[str, ...]
) -> tuple[Plan, tuple[str, ...]]:
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    problem = AttentionProblem.from_tensors(
        q, k, v if {"%out", "%lse"} & {*returns} else k, scale=settings.scale, tensor_layout=settings.tensor_layout
    )
    return plan_with_notes(
        problem,
        settings.layout(),
        settings.chosen_policy(arguments),
        omitted=settings.omitted,
        order=settings.order,
        returns=returns,
        quotas=arguments["quotas"] is not None,
        kv_lengths=arguments["kv_lengths"] is not None,
        precision=settings.precision,
        rotate=settings.rotate,
    )
