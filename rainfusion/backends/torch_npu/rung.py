"""Rung: one operator that can attend by a block mask, and what it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from rainfusion.backends.torch_npu.chips import Chip
from rainfusion.backends.torch_npu.operators import call
from rainfusion.core.ir import Plan
from rainfusion.core.problem import AttentionProblem

Attended = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Wanted:
    """The static facts of one attention.

    Attributes:
        problem: shapes, dtype and scale.
        block: tokens in a query block and in a key block.
        is_dense: attend to all keys, without a mask.
        needs_lse: give the log-sum-exp too.
        chip: where it is to run.
    """

    problem: AttentionProblem
    block: tuple[int, int]
    is_dense: bool
    needs_lse: bool
    chip: Chip

    @classmethod
    def by(cls, plan: Plan, chip: Chip) -> Wanted:
        """What `plan` asks of its attention over tokens; merging with summaries takes the log-sum-exp."""
        needs_lse = "%lse" in plan.returns or (plan.omitted == "summary" and not plan.is_dense)
        return cls(plan.problem, plan.block, plan.is_dense, needs_lse, chip)


class Rung(ABC):
    """One operator.

    Args:
        operator: its name in `torch.ops`, ``namespace::name``.
    """

    # Every argument that is bound, by keyword; an operator of that name with others is another operator.
    keywords: ClassVar[frozenset[str]]

    def __init__(self, operator: str) -> None:
        self.operator = operator

    @abstractmethod
    def objections(self, wanted: Wanted) -> Iterator[str]:
        """Why the operator cannot do it, as documented; nothing where it can."""

    @abstractmethod
    def arguments(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wanted: Wanted) -> dict[str, Any]:
        """The operator's arguments.

        Args:
            q: ``[B, H, q_len, D]``; k, v: ``[B, H or fewer, kv_len, D]``; contiguous, in block order.
            mask: bool ``[B, H, q blocks, key blocks]``, True where attention is computed; None for dense.
        """

    @abstractmethod
    def results(self, returned: tuple[Any, ...], wanted: Wanted) -> Attended:
        """Output ``[B, H, q_len, D]`` in the dtype of q, and log-sum-exp, float32 ``[B, H, q_len]``, if needed."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, wanted: Wanted) -> Attended:
        """Call the operator on tensors as `arguments` takes them.

        Raises:
            LacksSymbolError: this CANN does not have it.
        """
        return self.results(call(self.operator, self.arguments(q, k, v, mask, wanted)), wanted)

    def __str__(self) -> str:
        return self.operator
