"""torch.compile and torch.export: a lowered plan as one operator of the graph.

Checks, conversions and kernels are nothing a tracer should walk through. While torch traces, a call records the
operator below instead; when the graph runs, the operator makes the very call. A fake implementation tells shapes. The
operator names the plan by its own JSON, so a graph that was saved finds it in another process.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rainfusion.core.errors import BackendUnavailableError, MaskError, ProblemError
from rainfusion.core.ir import Plan
from rainfusion.core.layout import TokenLayout
from rainfusion.core.lower import EXECUTABLES, Executable, lower
from rainfusion.core.mask import BlockMask
from rainfusion.plugins.manager import host

# Operators take no BlockMask: its grid, and what else it says of itself, as `written_mask` has it.
MASK_ARGUMENTS = "Tensor? mask, SymInt[] mask_sizes, SymInt[] mask_layout, str mask_sink, bool mask_is_sound"


def record(executable: Executable, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> Any:
    """A call of a lowered plan while torch traces; None while it does not.

    Raises:
        ProblemError: a plan that returns its mask, which is no tensor.
        MaskError: a mask that is no BlockMask.
    """
    if not torch.compiler.is_compiling():
        return None
    if "%mask" in executable.plan.returns:
        raise ProblemError("a BlockMask cannot leave a traced graph; plan without '%mask' among the results")
    results = torch.ops.rainfusion.run(q, k, v, *written_mask(mask), executable.key)
    return results[0] if len(executable.plan.returns) == 1 else tuple(results)


def written_mask(mask: BlockMask | None) -> tuple[Tensor | None, list[int], list[int], str, bool]:
    """A mask as operators take it: `MASK_ARGUMENTS`.

    Raises:
        MaskError: it is no BlockMask.
    """
    if mask is None:
        return None, [], [], "", False
    if not isinstance(mask, BlockMask):
        raise MaskError(f"mask is a {type(mask).__name__}; give a BlockMask")
    layout, sizes = mask.layout, [mask.q_len, mask.kv_len, *mask.block]
    if layout is None or layout.grid is None or layout.window is None:
        return mask.blocks, sizes, [], "", mask.is_sound
    at_end = int(layout.text_position == "end")
    written = [*layout.grid, *layout.window, layout.text, at_end]
    return mask.blocks, sizes, written, layout.sink or "", mask.is_sound


def read_mask(
    blocks: Tensor | None, sizes: list[int], layout: list[int], sink: str, is_sound: bool
) -> BlockMask | None:
    """The mask that `written_mask` wrote."""
    if blocks is None:
        return None
    made = None
    if layout:
        grid, window, (text, at_end) = tuple(layout[:3]), tuple(layout[3:6]), layout[6:]
        position = "end" if at_end else "start"
        made = TokenLayout(grid, text, position, window, (sizes[2], sizes[3]), sink or None)  # type: ignore[arg-type]
    mask = BlockMask(blocks, sizes[0], sizes[1], (sizes[2], sizes[3]), made)
    return mask.vouched() if is_sound else mask


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


def _executable(key: str) -> Executable:
    """The executable of that key: one that is there, or, in a graph that outlived it, the same plan lowered again."""
    return EXECUTABLES.get(key) or _lowered(key)


@lru_cache(maxsize=64)
def _lowered(key: str) -> Executable:
    name, address, plan = json.loads(key)
    backend = host().backend(name)
    for device in backend.devices():
        if str(device) == address:
            return lower(Plan.from_json(plan), backend, device)
    raise BackendUnavailableError(
        f"this graph calls rainfusion on {address}, which backend {name!r} does not find here"
    )


# Schemas are spelled out: before 2.7 torch infers none from built-in generics.
@torch.library.custom_op(
    "rainfusion::run",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {MASK_ARGUMENTS}, str key) -> Tensor[]",
)
def _run(q: Tensor, k: Tensor, v: Tensor, *mask_and_key: Any) -> list[Tensor]:
    *mask, key = mask_and_key
    return as_list(_executable(key).run(q, k, v, read_mask(*mask)))


@_run.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *mask_and_key: Any) -> list[Tensor]:
    plan = _executable(mask_and_key[-1]).plan
    rows = (plan.problem.batch, plan.problem.heads, plan.problem.q_len)
    made = results_like(q, rows, wants_lse=True)
    return [made[("%out", "%lse").index(name)] for name in plan.returns]
