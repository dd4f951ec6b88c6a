"""`rainfusion.attention` while torch.compile or torch.export trace it: one operator of the graph.

Planning and choosing are Python that no tracer should walk through. The operator takes the call's arguments as plain
values and makes the very call when the graph runs; a fake implementation tells shapes, so lengths may be dynamic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rainfusion import api
from rainfusion.backends.torch_graph import as_list, results_like
from rainfusion.core.errors import ProblemError
from rainfusion.core.mask import BlockMask
from rainfusion.core.policy import Fixed, Policy, TopK, TopP


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    policy: Policy | None,
    *,
    return_lse: bool,
    return_mask: bool,
    block: int | tuple[int, int],
    **settings: Any,
) -> Any:
    """`rainfusion.attention` while tracing; the same arguments and results, but for the mask, which is no tensor.

    Raises:
        ProblemError: `return_mask`.
    """
    if return_mask:
        raise ProblemError("a BlockMask cannot leave a traced graph; call rainfusion outside of torch.compile for it")
    name, numbers, counting = _written(policy)
    results = torch.ops.rainfusion.attention(
        q,
        k,
        v,
        None if mask is None else mask.blocks,
        policy=name,
        numbers=numbers,
        counting=counting,
        return_lse=return_lse,
        block=[block] if isinstance(block, int) else list(block),
        **settings,
    )
    return tuple(results) if return_lse else results[0]


@torch.library.custom_op("rainfusion::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    policy: str,
    numbers: list[float],
    counting: str,
    grid: list[int] | None,
    text: int,
    text_position: str,
    sparsity: float | None,
    block: list[int],
    window: list[int] | None,
    sink: str | None,
    omitted: str,
    tensor_layout: str,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
) -> list[Tensor]:
    tokens = 2 if tensor_layout == "bhsd" else 1
    sides = (block[0], block[-1])
    given = None if mask is None else BlockMask(mask, q.shape[tokens], k.shape[tokens], sides)
    results = api.attention(
        q,
        k,
        v,
        grid=None if grid is None else tuple(grid),  # type: ignore[arg-type]
        text=text,
        text_position=text_position,
        sparsity=sparsity,
        policy=_read(policy, numbers, counting),
        block=sides,
        window=None if window is None else tuple(window),  # type: ignore[arg-type]
        sink=sink,
        omitted=omitted,
        tensor_layout=tensor_layout,
        scale=scale,
        mask=given,
        return_lse=return_lse,
        backend=backend,
    )
    return as_list(results)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **settings: Any) -> list[Tensor]:
    bhsd = settings["tensor_layout"] == "bhsd"
    batch, heads, length = q.shape[0], q.shape[1 if bhsd else 2], q.shape[2 if bhsd else 1]
    return results_like(q, (batch, heads, length), wants_lse=settings["return_lse"])


def _written(policy: Policy | None) -> tuple[str, list[float], str]:
    """A policy as an operator takes it."""
    if isinstance(policy, TopK):
        return "topk", [policy.sparsity], policy.counting
    if isinstance(policy, TopP):
        return "topp", [policy.mass, policy.floor], ""
    return ("fixed" if isinstance(policy, Fixed) else ""), [], ""


def _read(name: str, numbers: list[float], counting: str) -> Policy | None:
    if name == "topk":
        return TopK(numbers[0], counting)
    if name == "topp":
        return TopP(*numbers)
    return Fixed() if name == "fixed" else None
