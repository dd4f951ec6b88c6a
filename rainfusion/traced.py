"""`rainfusion.attention` while torch.compile or torch.export trace it: one operator of the graph.

Planning and choosing are Python that no tracer should walk through. The operator takes the call's arguments as plain
values and makes the very call when the graph runs; a fake implementation tells shapes, so lengths may be dynamic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rainfusion import api
from rainfusion.backends.torch_graph import MASK_ARGUMENTS, as_list, read_mask, results_like, written_mask
from rainfusion.core.errors import PolicyError, ProblemError
from rainfusion.core.mask import BlockMask
from rainfusion.core.policy import Fixed, Policy, TopK, TopP


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: BlockMask | None,
    policy: Policy | None,
    return_lse: bool,
    return_mask: bool,
    block: int | tuple[int, int],
    **settings: Any,
) -> Any:
    """`rainfusion.attention` while tracing; the same arguments and results, but for the mask, which is no tensor.

    Raises:
        ProblemError: `return_mask`.
        PolicyError, MaskError: a policy or mask of another kind. What else is wrong is said when the graph runs.
    """
    if return_mask:
        raise ProblemError("a BlockMask cannot leave a traced graph; call rainfusion outside of torch.compile for it")
    name, numbers, counting = _written(policy)
    results = torch.ops.rainfusion.attention(
        q,
        k,
        v,
        *written_mask(mask),
        policy=name,
        numbers=numbers,
        counting=counting,
        return_lse=return_lse,
        block=[block] if isinstance(block, int) else list(block),
        **settings,
    )
    return tuple(results) if return_lse else results[0]


@torch.library.custom_op(
    "rainfusion::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {MASK_ARGUMENTS}, *, str policy, float[] numbers, str counting, "
    "int[]? grid, int text, str text_position, float? sparsity, int[] block, int[]? window, str? sink, "
    "str omitted, str tensor_layout, float? scale, bool return_lse, str? backend) -> Tensor[]",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, *mask: Any, **settings: Any) -> list[Tensor]:
    policy = _read(*(settings.pop(name) for name in ("policy", "numbers", "counting")))
    block, grid, window = (settings.pop(name) for name in ("block", "grid", "window"))
    settings |= {
        "block": block[0] if len(block) == 1 else tuple(block),
        "grid": None if grid is None else tuple(grid),
        "window": None if window is None else tuple(window),
    }
    return as_list(api.attention_now(q, k, v, policy=policy, mask=read_mask(*mask), **settings))


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *mask: Any, **settings: Any) -> list[Tensor]:
    bhsd = settings["tensor_layout"] == "bhsd"
    batch, heads, length = q.shape[0], q.shape[1 if bhsd else 2], q.shape[2 if bhsd else 1]
    return results_like(q, (batch, heads, length), wants_lse=settings["return_lse"])


def _written(policy: Policy | None) -> tuple[str, list[float], str]:
    """A policy as the operator takes it."""
    if isinstance(policy, TopK):
        return "topk", [policy.sparsity], policy.counting
    if isinstance(policy, TopP):
        return "topp", [policy.mass, policy.floor], ""
    if policy is None or isinstance(policy, Fixed):
        return "" if policy is None else "fixed", [], ""
    raise PolicyError(f"policy={policy!r} is not a policy; give TopK(...), TopP(...) or Fixed()")


def _read(name: str, numbers: list[float], counting: str) -> Policy | None:
    if name == "topk":
        return TopK(numbers[0], counting)
    if name == "topp":
        return TopP(*numbers)
    return Fixed() if name == "fixed" else None
