"""Programs of every kind, as the planner writes them and as others change them, and a check of a backend on one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from foreign import OwnBlockFirst

from rainfusion import AttentionProblem, BlockMask, Fixed, Hybrid, Plan, TokenLayout, TopK, TopP, lower, plan


@dataclass(frozen=True)
class Programs:
    """Plans of one problem, and tensors for them.

    Args:
        device: of the tensors.
        tolerance: allowed between a backend and the definitions, absolute and relative.
    """

    problem: AttentionProblem
    layout: TokenLayout
    device: str = "cpu"
    tolerance: float = 2e-5

    def plans(self) -> dict[str, Plan]:
        policies = {"topk": TopK(0.2), "topp": TopP(0.5), "hybrid": Hybrid(0.3, 0.3), "fixed": Fixed()}
        policies["own"] = OwnBlockFirst(0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plans = {"dense": plan(self.problem, self.layout, TopK(0), returns=["%out", "%lse"])}
            for name, policy in policies.items():
                for omitted in ("drop", "summary"):
                    planned = plan(self.problem, self.layout, policy, omitted=omitted, returns=["%out", "%lse"])
                    plans[f"{name}-{omitted}"] = planned
            plans["given"] = plan(self.problem, self.layout, omitted="summary", quotas=True, kv_lengths=True)
            plans["dense-lengths"] = plan(self.problem, self.layout, TopK(0), kv_lengths=True)
            plans["fixed-lengths"] = plan(
                self.problem, self.layout, Fixed(), kv_lengths=True, returns=["%out", "%lse", "%qb", "%kb"]
            )
            returns = ["%out", "%mask", "%qb", "%score"]
            plans["paper"] = plan(self.problem, self.layout, TopK(0.2, counting="paper"), returns=returns)
        return plans

    def inputs(self) -> list[torch.Tensor]:
        rng = np.random.default_rng(2)
        shapes = (self.problem.q_shape, *[self.problem.kv_shape] * 2)
        tensors = (torch.from_numpy(rng.standard_normal(s, dtype=np.float32)) for s in shapes)
        return [x.to(self.device, getattr(torch, self.problem.dtype)) for x in tensors]

    def operands(self, planned: Plan) -> dict[str, Any]:
        """What the plan is given at call time: a mask in which some rows keep nothing, quotas of heads, lengths."""
        p, given = self.problem, {}
        if planned.takes("%mask"):
            shape = (p.batch, p.heads, planned.q_axis.blocks, planned.kv_axis.blocks)
            blocks = np.random.default_rng(3).random(shape) < 0.4
            blocks[:, :, 1] = False
            mask = torch.from_numpy(blocks).to(self.device)
            given["mask"] = BlockMask(mask, p.q_len, p.kv_len, planned.block, self.layout)
        if planned.takes("%quotas"):
            given["quotas"] = planned.quotas(TopK(tuple(np.linspace(0.1, 0.4, p.heads).tolist())))
        if planned.takes("%kv_lengths"):
            lengths = [p.kv_len - 8 * i for i in range(p.batch)]
            given["kv_lengths"] = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        return given

    def check(self, planned: Plan, backend: str) -> str:
        """Run a plan on a backend and by its definitions, on the same numbers; returns who ran what."""
        inputs, given = self.inputs(), self.operands(planned)
        run = lower(planned, backend=backend, like=inputs[0])
        actual = run(*inputs, **given)
        expected = self.by_definition(planned, inputs, given)
        values = [x if isinstance(x, tuple) else (x,) for x in (actual, expected)]
        for a, b in zip(*values, strict=True):
            if isinstance(a, BlockMask):
                assert torch.equal(a.blocks.cpu(), b.blocks.cpu())
            else:
                torch.testing.assert_close(a.cpu().float(), b.float(), atol=self.tolerance, rtol=self.tolerance)
        return str(run)

    @staticmethod
    def by_definition(planned: Plan, inputs: list[torch.Tensor], given: dict[str, Any]) -> Any:
        on_host = {name: x.to("cpu") if isinstance(x, BlockMask | torch.Tensor) else x for name, x in given.items()}
        tensors = [x.cpu() for x in inputs]
        return lower(planned, backend="reference", like=tensors[0])(*tensors, **on_host)

    def stays_on_kernels(self, planned: Plan, insert: Callable[[Plan], Plan], backend: str) -> None:
        """Insert a foreign operation: it runs by its definition, and what ran on kernels before still does."""
        changed = insert(planned)
        if changed == planned:  # no place for the operation in this plan
            assert insert.__name__ != "scaled_output"
            return
        foreign = {op.name for op in changed.ops} - {op.name for op in planned.ops}
        shown = self.check(changed, backend)
        assert all(any(name in line for line in shown.splitlines() if "definition" in line) for name in foreign)
        own = str(lower(planned, backend=backend, like=self.inputs()[0]))
        assert _on_kernels(shown, backend) == _on_kernels(own, backend), f"{shown}\nleft its kernels; before:\n{own}"


def _on_kernels(shown: str, backend: str) -> int:
    lines = [line for line in shown.splitlines()[1:] if line.strip().startswith(backend)]
    return sum(line.count(" + ") + 1 for line in lines)
