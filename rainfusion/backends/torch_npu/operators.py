"""The operators that can attend by a block mask, in order of preference, and what happens when CANN lacks one.

| operator                         | reads                    | log-sum-exp | lengths | where                     |
|----------------------------------|--------------------------|-------------|---------|---------------------------|
| npu::npu_block_sparse_attention  | the block mask           | yes         | no      | everywhere                |
| mindiesd::block_sparse_attention | the block mask           | yes         | no      | with MindIE-SD            |
| mindiesd::rainfusionattention    | lists of kept blocks     | no          | no      | with MindIE-SD, A2 and A3 |
| npu::npu_fusion_attention        | the mask, token by token | yes         | yes     | while that mask is small  |

The first that can is used. Where none can, the plan is refused with the reason of each: what was to be sparse never
becomes dense unseen. The first three take lengths as numbers on the host, for which a call would have to wait.

Sources: op-plugin's schemas and documentation of npu_block_sparse_attention and npu_fusion_attention, MindIE-SD's
schemas, CANN's documentation of aclnnBlockSparseAttention and aclnnRainFusionAttention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rainfusion.backends.torch_npu.calls import LacksSymbolError, call, trouble
from rainfusion.backends.torch_npu.detection import Chip
from rainfusion.backends.torch_npu.nonfinite import finite, spoiled
from rainfusion.core.errors import LoweringError, RainfusionWarning, warn_caller
from rainfusion.core.ops import Attend
from rainfusion.core.plan import Plan
from rainfusion.core.problem import AttentionProblem

Attended = tuple[Tensor, Tensor | None]

KEY_BLOCK = 128  # key blocks of the block-sparse operators are multiples of it
HEAD_DIMS = (64, 128)  # what they have; others are padded with zeros, which change nothing
MOST_GROUPED = 128  # query heads a key head with index lists: fewer than this, and a divisor of it
FULL_MASK = 1  # sparse_mode of fusion attention: the mask says all
LARGEST_MASK = 2 << 30  # bytes, one a pair of tokens and head
MOST_HEADS, MOST_TOKENS, LARGEST_HEAD_DIM = 256, 1 << 20, 768  # of fusion attention
_SIXTEEN_BIT = ("float16", "bfloat16")


@dataclass(frozen=True)
class Request:
    """The static facts of one attention over tokens.

    Attributes:
        problem: shapes, dtype and scale.
        block: tokens in a query block and in a key block.
        is_dense: attend to all keys, without a mask.
        needs_lse: give the log-sum-exp too.
        has_lengths: keys at or beyond a sample's length take no part.
        chip: where it is to run.
    """

    problem: AttentionProblem
    block: tuple[int, int]
    is_dense: bool
    needs_lse: bool
    has_lengths: bool
    chip: Chip

    @classmethod
    def of(cls, attend: Attend, plan: Plan, chip: Chip) -> Request:
        """What an operation of a plan asks for."""
        (batch, heads, q_len, dim), dtype = plan.types[attend.q]
        kv_heads, kv_len = plan.types[attend.k].shape[1:3]
        problem = AttentionProblem(batch, heads, q_len, kv_len, dim, dtype, kv_heads, attend.scale)
        read = {*plan.returns, *(name for op in plan.ops for name in op.reads)}
        return cls(problem, attend.block, attend.mask is None, attend.lse in read, attend.lengths is not None, chip)


@dataclass(frozen=True)
class Tensors:
    """The tensors of one attention, contiguous and in block order.

    Attributes:
        q: ``[B, H, q_len, D]``; k, v: ``[B, H or fewer, kv_len, D]``.
        mask: bool ``[B, H, q blocks, key blocks]``, True where attention is computed; None for dense.
        hidden: bool ``[B, kv_len]``, True for keys that take no part; None where all do.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    hidden: Tensor | None = None


class Operator(ABC):
    """One operator.

    Args:
        operator: its name in `torch.ops`, ``namespace::name``.
    """

    # Every argument that is bound, by keyword; an operator of that name with others is another operator.
    keywords: ClassVar[frozenset[str]]

    def __init__(self, operator: str) -> None:
        self.operator = operator

    @abstractmethod
    def objections(self, request: Request) -> Iterator[str]:
        """Why the operator cannot do it, as documented; nothing where it can."""

    @abstractmethod
    def arguments(self, given: Tensors, request: Request) -> dict[str, Any]:
        """The operator's arguments. Every row of the mask keeps a block."""

    @abstractmethod
    def results(self, returned: tuple[Any, ...], request: Request) -> Attended:
        """Output ``[B, H, q_len, D]`` in the dtype of q, and log-sum-exp, float32 ``[B, H, q_len]``, if needed."""

    def attend(self, given: Tensors, request: Request) -> Attended:
        """Call the operator.

        Raises:
            LacksSymbolError: this CANN does not have it.
        """
        return self.results(call(self.operator, self.arguments(given, request)), request)

    def __str__(self) -> str:
        return self.operator


class BlockMaskOperator(Operator):
    """Reads a mask of 8-bit numbers, 1 where a block is attended: torch_npu's, and MindIE-SD's of the same form."""

    keywords = frozenset(
        {"query", "key", "value", "block_sparse_mask", "block_shape", "q_input_layout", "kv_input_layout"}
        | {"num_key_value_heads", "scale_value", "inner_precise", "actual_seq_lengths", "actual_seq_lengths_kv"}
        | {"softmax_lse_flag"}
    )

    def objections(self, request: Request) -> Iterator[str]:
        if request.is_dense:
            yield "no dense attention: it takes a mask"
        yield from _block_sparse_limits(request)

    def arguments(self, given: Tensors, request: Request) -> dict[str, Any]:
        assert given.mask is not None
        p = request.problem
        return {
            "query": padded(given.q),
            "key": padded(given.k),
            "value": padded(given.v),
            "block_sparse_mask": given.mask.to(torch.int8),  # nothing converts it on the way to CANN
            "block_shape": list(request.block),
            "q_input_layout": "BNSD",
            "kv_input_layout": "BNSD",
            "num_key_value_heads": p.kv_heads,
            "scale_value": p.scale,
            "inner_precise": request.chip.inner_precise,
            "actual_seq_lengths": [p.q_len] * p.batch,
            "actual_seq_lengths_kv": [p.kv_len] * p.batch,
            "softmax_lse_flag": int(request.needs_lse),
        }

    def results(self, returned: tuple[Any, ...], request: Request) -> Attended:
        out, lse = returned[:2]  # without the flag the second is memory that was never written
        return out[..., : request.problem.head_dim], lse.squeeze(-1) if request.needs_lse else None


class IndexListsOperator(Operator):
    """MindIE-SD's older operator: tokens of all samples in one row (TND), the kept blocks of every row as a list."""

    keywords = frozenset(
        {"query", "key", "value", "select_idx", "select_num_idx", "blockshape", "actual_seq_qlen", "actual_seq_kvlen"}
        | {"q_input_layout", "kv_input_layout", "head_num", "mask_type", "scale", "inner_precise", "block_size"}
    )

    def objections(self, request: Request) -> Iterator[str]:
        group = request.problem.group
        if not request.chip.has_index_lists:
            yield f"not on chip {request.chip.name}"
        if request.is_dense:
            yield "no dense attention: it takes lists of blocks"
        if request.needs_lse:
            yield "no log-sum-exp"
        if group >= MOST_GROUPED or MOST_GROUPED % group:
            yield f"no groups of {group} query heads (divisors of {MOST_GROUPED} below it)"
        yield from _block_sparse_limits(request)

    def arguments(self, given: Tensors, request: Request) -> dict[str, Any]:
        assert given.mask is not None
        p = request.problem
        blocks, counts = kept_blocks(given.mask)
        return {
            "query": _one_row(padded(given.q)),
            "key": _one_row(padded(given.k)),
            "value": _one_row(padded(given.v)),
            "select_idx": blocks,
            "select_num_idx": counts,
            "blockshape": list(request.block),
            "actual_seq_qlen": [p.q_len] * p.batch,
            "actual_seq_kvlen": [p.kv_len] * p.batch,
            "q_input_layout": "TND",
            "kv_input_layout": "TND",
            "head_num": p.kv_heads,
            "mask_type": 0,
            "scale": p.scale,
            "inner_precise": request.chip.inner_precise,
            "block_size": 0,
        }

    def results(self, returned: tuple[Any, ...], request: Request) -> Attended:
        p = request.problem
        samples = returned[0].unflatten(0, (p.batch, p.q_len))
        return samples.transpose(1, 2)[..., : p.head_dim], None


class FusionOperator(Operator):
    """Dense flash attention under a mask that is True where a pair of tokens is left out.

    Exact, and no faster than dense attention; for plans that no block-sparse operator here can do, while the mask is
    small. It also runs plans that omit nothing, without a mask.
    """

    keywords = frozenset({"query", "key", "value", "head_num", "input_layout", "atten_mask", "scale", "sparse_mode"})

    def objections(self, request: Request) -> Iterator[str]:
        p = request.problem
        is_masked = not request.is_dense or request.has_lengths
        size = prod((p.batch, 1 if request.is_dense else p.heads, p.q_len, p.kv_len))
        if is_masked and size > LARGEST_MASK:
            yield f"its mask, token by token, would take {size / 2**30:.1f} GiB (at most {LARGEST_MASK / 2**30:g} GiB)"
        yield from fusion_limits(p)

    def arguments(self, given: Tensors, request: Request) -> dict[str, Any]:
        omitted = left_out(given, request.block)
        return {
            "query": given.q,
            "key": given.k,
            "value": given.v,
            "head_num": request.problem.heads,
            "input_layout": "BNSD",
            "atten_mask": omitted,
            "scale": request.problem.scale,
            "sparse_mode": 0 if omitted is None else FULL_MASK,
        }

    def attend(self, given: Tensors, request: Request) -> Attended:
        if given.mask is None:
            return super().attend(given, request)
        clean = Tensors(given.q, finite(given.k), finite(given.v), given.mask, given.hidden)
        out, lse = super().attend(clean, request)
        return spoiled(out, lse, given.k, given.v, given.mask, request.block)

    def results(self, returned: tuple[Any, ...], request: Request) -> Attended:
        return returned[0], log_sum_exp(returned) if request.needs_lse else None


OPERATORS: tuple[Operator, ...] = (
    BlockMaskOperator("npu::npu_block_sparse_attention"),
    BlockMaskOperator("mindiesd::block_sparse_attention"),
    IndexListsOperator("mindiesd::rainfusionattention"),
    FusionOperator("npu::npu_fusion_attention"),
)
"""In order of preference."""


def operator_for(request: Request) -> Operator:
    """The first operator that can do it.

    Raises:
        LoweringError: none can; the message has the reasons.
    """
    able = next((operator for operator in OPERATORS if not _reasons(operator, request)), None)
    if able is None:
        raise LoweringError(f"{'; '.join(refusals(request))}. backend='torch' does it with plain torch operations")
    return able


def refusals(request: Request) -> list[str]:
    """Why no operator can do it, one entry an operator; empty where one can."""
    reasons = {operator: _reasons(operator, request) for operator in OPERATORS}
    if not all(reasons.values()):
        return []
    return [f"{operator}: {' and '.join(why)}" for operator, why in reasons.items()]


def attend(given: Tensors, request: Request) -> Attended:
    """Attend by the first operator that can.

    Warns:
        RainfusionWarning: CANN lacks an operator. Once: this process does not try it again.

    Raises:
        LoweringError: no operator is left.
    """
    while True:
        operator = operator_for(request)
        try:
            return operator.attend(given, request)
        except LacksSymbolError as lacking:
            left = [str(other) for other in OPERATORS if not _reasons(other, request)]
            instead = f"using {left[0]} instead" if left else "no other operator can do this plan"
            warn_caller(f"{lacking}; {instead}", RainfusionWarning)


def _reasons(operator: Operator, request: Request) -> list[str]:
    """Why an operator is out. What is installed is looked up last: it may have to import MindIE-SD."""
    documented = [*operator.objections(request)]
    missing = "" if documented else trouble(operator.operator, operator.keywords)
    return documented or ([missing] if missing else [])


def _block_sparse_limits(request: Request) -> Iterator[str]:
    """What no block-sparse operator takes."""
    p = request.problem
    if p.dtype not in _SIXTEEN_BIT:
        yield f"no dtype {p.dtype} ({', '.join(_SIXTEEN_BIT)})"
    if request.has_lengths:
        yield "no lengths that only the device knows"
    if request.block[1] % KEY_BLOCK:
        yield f"no key blocks of {request.block[1]} (multiples of {KEY_BLOCK})"
    if p.head_dim > HEAD_DIMS[-1]:
        yield f"no head dim {p.head_dim} (at most {HEAD_DIMS[-1]})"


def fusion_limits(p: AttentionProblem) -> Iterator[str]:
    """What fusion attention does not take, whatever the mask."""
    longest = max(p.q_len, p.kv_len)
    if p.head_dim > LARGEST_HEAD_DIM:
        yield f"no head dim {p.head_dim} (at most {LARGEST_HEAD_DIM})"
    if p.heads > MOST_HEADS:
        yield f"no {p.heads} heads (at most {MOST_HEADS})"
    if longest > MOST_TOKENS:
        yield f"no {longest} tokens (at most {MOST_TOKENS})"


def padded(x: Tensor) -> Tensor:
    """Zeros appended to the channels of ``[..., D]`` up to the next head dim.

    A channel that is zero in q and k adds nothing to a logit; one that is zero in v makes an output that is cut off.
    """
    missing = next(dim for dim in HEAD_DIMS if dim >= x.shape[-1]) - x.shape[-1]
    return pad(x, (0, missing)) if missing else x


def kept_blocks(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The kept key blocks of every row of a mask ``[B, H, q blocks, key blocks]``, sample after sample.

    Returns:
        int64 ``[B * q blocks, H, key blocks]``, ascending, then -1; and how many, int64 ``[B * q blocks, H]``.
    """
    columns = mask.shape[-1]
    rows = mask.transpose(1, 2).flatten(0, 1).contiguous()
    # float32, because NPUs sort whole numbers on their CPU
    numbers = torch.arange(0, columns, 1, dtype=torch.float32, device=mask.device)
    ranked = torch.where(rows, numbers, columns).sort(dim=-1, stable=True).values
    return torch.where(ranked < columns, ranked, -1).to(torch.int64), rows.sum(dim=-1)


def left_out(given: Tensors, block: tuple[int, int]) -> Tensor | None:
    """The pairs of tokens that take no part: bool ``[B, H or 1, q_len, kv_len]``, or None where all do."""
    q_len, kv_len = given.q.shape[2], given.k.shape[2]
    hidden = None if given.hidden is None else given.hidden[:, None, None]
    if given.mask is None:
        return None if hidden is None else hidden.repeat_interleave(q_len, dim=2).contiguous()
    rows = (~given.mask).repeat_interleave(block[0], dim=2)[:, :, :q_len]
    omitted = rows.repeat_interleave(block[1], dim=3)[..., :kv_len]
    return (omitted if hidden is None else omitted | hidden).contiguous()


def log_sum_exp(returned: tuple[Any, ...]) -> Tensor:
    """The log-sum-exp, float32 ``[B, H, q_len]``, of maximum and sum, each of which is returned eight times."""
    maximum, total = (x[..., 0] for x in returned[1:3])
    lse: Tensor = maximum + total.log()
    return lse


def _one_row(x: Tensor) -> Tensor:
    """``[B, H, tokens, D]`` as ``[B * tokens, H, D]``."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()
