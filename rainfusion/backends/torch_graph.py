"""torch.compile and torch.export: a lowered plan as one operator of the graph.

Checks, conversions and kernels are nothing a tracer should walk through. While torch traces, a call records the
operator below instead; when the graph runs, the operator makes the very call. A fake implementation tells shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rainfusion.core.errors import ProblemError
from rainfusion.core.lower import EXECUTABLES, Executable
from rainfusion.core.mask import BlockMask


def is_tracing() -> bool:
    """Whether torch is recording a graph just now."""
    return bool(torch.compiler.is_compiling())


def run(executable: Executable, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> Any:
    """A call of a lowered plan while tracing.

    Raises:
        ProblemError: a plan that returns its mask, which is no tensor.
    """
    if "%mask" in executable.plan.returns:
        raise ProblemError("a BlockMask cannot leave a traced graph; plan without '%mask' among the results")
    blocks = None if mask is None else mask.blocks
    results = torch.ops.rainfusion.run(q, k, v, blocks, executable.key)
    return results[0] if len(executable.plan.returns) == 1 else tuple(results)


@torch.library.custom_op("rainfusion::run", mutates_args=())
def _run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: str) -> list[Tensor]:
    run = _executable(key)
    plan, problem = run.plan, run.plan.problem
    given = None if mask is None else BlockMask(mask, problem.q_len, problem.kv_len, plan.block)
    return as_list(run(q, k, v, mask=given))


@_run.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key: str) -> list[Tensor]:
    plan = _executable(key).plan
    rows = (plan.problem.batch, plan.problem.heads, plan.problem.q_len)
    made = results_like(q, rows, wants_lse=True)
    return [made[("%out", "%lse").index(name)] for name in plan.returns]


def _executable(key: str) -> Executable:
    executable = EXECUTABLES.get(key)
    if executable is None:
        raise ProblemError("the lowered plan that this graph calls is no longer there; keep it as long as the graph")
    return executable


def results_like(q: Tensor, rows: tuple[int, int, int], *, wants_lse: bool) -> list[Tensor]:
    """Empty tensors as a call returns them: the output, and the log-sum-exp of ``[batch, heads, q_len]`` rows."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not wants_lse:
        return [out]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return [out, torch.empty(rows, dtype=dtype, device=q.device)]


def as_list(results: Any) -> list[Tensor]:
    """What a call returned as `results_like` describes it: a list of contiguous tensors."""
    return [x.contiguous() for x in (results if isinstance(results, tuple) else (results,))]
