"""A call that all ranks have agreed on: the problem of the whole sequence, and what each of them brings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from rainfusion import dispatch
from rainfusion.calls import Settings
from rainfusion.core.errors import RainfusionWarning
from rainfusion.core.executable import Executable
from rainfusion.core.plan import Plan
from rainfusion.core.planner import plan_with_notes
from rainfusion.core.policies import Policy
from rainfusion.core.problem import AttentionProblem
from rainfusion.distributed.ranks import Ranks
from rainfusion.distributed.shards import Shards

TOKENS = {"bhsd": 2, "bshd": 1}
HEADS = {"bhsd": 1, "bshd": 2}


@dataclass(frozen=True)
class Call:
    """What all ranks have agreed on.

    Attributes:
        shard: the problem of this rank's tensors.
        q_shards, kv_shards: query and key tokens of every rank.
        policy: that of all heads.
        given: which of ``mask``, ``quotas`` and ``kv_lengths`` are given at call time.
        returns: what the caller wants, of ``%out``, ``%lse`` and ``%mask``.
        backend: as in `rainfusion.attention`.
    """

    ranks: Ranks
    shard: AttentionProblem
    q_shards: Shards
    kv_shards: Shards
    settings: Settings
    policy: Policy
    given: frozenset[str]
    returns: tuple[str, ...]
    backend: str | None

    @cached_property
    def problem(self) -> AttentionProblem:
        """The problem of the whole sequence."""
        return replace(self.shard, q_len=sum(self.q_shards.lengths), kv_len=sum(self.kv_shards.lengths))

    @property
    def token_axis(self) -> int:
        """The axis of tokens in q, k, v and the output."""
        return TOKENS[self.shard.tensor_layout]

    @property
    def head_axis(self) -> int:
        """The axis of heads in q, k, v and the output."""
        return HEADS[self.shard.tensor_layout]

    def plan(
        self, problem: AttentionProblem, policy: Policy, returns: tuple[str, ...], **other: Any
    ) -> tuple[Plan, tuple[str, ...]]:
        """Plan a problem by the settings of the call; with what the caller is to be warned of."""
        settings = self.settings
        named = ("omitted", "order", "precision", "rotate")
        asked: dict[str, Any] = {**{name: getattr(settings, name) for name in named}, **other}
        operands: dict[str, Any] = {name: name in self.given for name in ("quotas", "kv_lengths")}
        return plan_with_notes(problem, settings.layout(), policy, returns=returns, **asked, **operands)

    @cached_property
    def whole(self) -> tuple[Plan, tuple[str, ...]]:
        """What one device would plan, and would warn of."""
        return self.plan(self.problem, self.policy, ("%out",))

    def executable(self, plan: Plan, like: Tensor) -> Executable:
        """A plan, lowered where a tensor lives."""
        return dispatch.prepare(plan, (), like=like, backend=self.backend).executable

    def notes_of_precision(self, plan: Plan, like: Tensor) -> tuple[tuple[str, type[RainfusionWarning]], ...]:
        """What a caller who asked for 8 bits is to be warned of, where a tensor lives."""
        if self.settings.precision is None:
            return ()
        return dispatch.prepare(plan, (), like=like, backend=self.backend).notes


def run(executable: Executable, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The values that a plan returns, as a tuple, from those of the arguments that it reads."""
    plan = executable.plan
    read = {name: value for name, value in arguments.items() if plan.takes(f"%{name}")}
    values = executable.run(read)
    return values if len(plan.returns) > 1 else (values,)
