"""The operators that can attend by a block mask, in order of preference, and what happens when CANN lacks one.

| operator                         | reads                    | log-sum-exp | lengths      | where                     |
|----------------------------------|--------------------------|-------------|--------------|---------------------------|
| npu::npu_block_sparse_attention  | the block mask           | yes         | on the host  | everywhere                |
| mindiesd::block_sparse_attention | the block mask           | yes         | on the host  | with MindIE-SD            |
| mindiesd::rainfusionattention    | lists of kept blocks     | no          | no           | with MindIE-SD, A2 and A3 |
| npu::npu_fusion_attention        | the mask, token by token | yes         | in that mask | while that mask is small  |

The first that can is used. Where none can, the plan is refused with the reason of each: what was to be sparse never
becomes dense unseen. What the block-sparse ones take on each chip is in chips.py.

Sources: op-plugin's schemas and documentation of npu_block_sparse_attention and npu_fusion_attention, the schemas in
MindIE-SD's extension library, CANN's documentation of aclnnBlockSparseAttention and aclnnRainFusionAttention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from rainfusion.backends.torch_npu.chips import Chip
from rainfusion.core.errors import BackendUnavailableError, LoweringError, RainfusionWarning, warn_caller
from rainfusion.core.ops import Attend, block_mean
from rainfusion.core.plan import Plan
from rainfusion.core.problem import AttentionProblem

Attended = tuple[Tensor, Tensor | None]

MOST_GROUPED = 128  # query heads a key head with index lists: fewer than this, and a divisor of it
FULL_MASK = 1  # sparse_mode of fusion attention: the mask says all
LARGEST_MASK = 2 << 30  # bytes, one a pair of tokens and head
MOST_HEADS, MOST_TOKENS, LARGEST_HEAD_DIM = 256, 1 << 20, 768  # of fusion attention

# How torch_npu and MindIE-SD say, at the first call, that the installed CANN has no such function.
_NO_SYMBOL = "not in libopapi.so"

_lacking: dict[str, str] = {}


class LacksSymbolError(BackendUnavailableError):
    """The operator is registered, but the installed CANN does not have the function behind it."""


def trouble(operator: str, keywords: frozenset[str]) -> str:
    """Why ``namespace::name`` cannot be called with these keywords; empty where nothing is known against it."""
    if operator in _lacking:
        return _lacking[operator]
    found = _operator(operator)
    if found is None:
        return _why_absent(operator)
    takes = {argument.name for argument in found._schema.arguments}
    unknown = sorted(keywords - takes)
    return f"the one installed has another form, without {', '.join(unknown)}" if unknown else ""


def call(operator: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Call ``namespace::name``.

    Raises:
        LacksSymbolError: this CANN does not have it; remembered, so that `trouble` says so from now on.
    """
    try:
        returned: tuple[Any, ...] = _operator(operator)(**arguments)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        if _NO_SYMBOL not in said:
            raise
        _lacking[operator] = f"the installed CANN lacks it ({said})"
        raise LacksSymbolError(f"{operator}: {_lacking[operator]}", "install a newer CANN") from error
    return returned


def _operator(operator: str) -> Any:
    namespace, name = operator.split("::")
    registered = getattr(torch.ops, namespace)
    if namespace == "mindiesd" and not hasattr(registered, name):
        _mindiesd_trouble()
    return getattr(getattr(registered, name, None), "default", None)


def _why_absent(operator: str) -> str:
    if operator.startswith("mindiesd::"):
        return _mindiesd_trouble() or "this MindIE-SD does not have it"
    return "this torch_npu does not have it"


@cache
def _mindiesd_trouble() -> str:
    """Import MindIE-SD, which registers its operators; why that failed, or empty."""
    if find_spec("mindiesd") is None:
        return "MindIE-SD is not installed"
    try:
        import_module("mindiesd")
    except (Exception, SystemExit) as error:  # a vendor's stack raises errors of any kind
        return f"importing mindiesd failed: {type(error).__name__}: {error}".partition("\n")[0]
    return ""


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
        q_lengths, kv_lengths: tokens of every sample that take part, as numbers on the host; None where all do, or
            where the operator does not ask for them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    hidden: Tensor | None = None
    q_lengths: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None


class Operator(ABC):
    """One operator.

    Args:
        operator: its name in `torch.ops`, ``namespace::name``.
    """

    # Every argument that is bound, by keyword; an operator of that name with others is another operator.
    keywords: ClassVar[frozenset[str]]
    takes_numbers: ClassVar[bool] = False
    """Whether lengths are numbers on the host, for which a call has to wait if they are on the device."""
    is_sparse: ClassVar[bool] = True
    """Whether it spends time on kept blocks alone."""

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
    takes_numbers = True

    def objections(self, request: Request) -> Iterator[str]:
        if request.is_dense and not request.has_lengths:
            yield "no dense attention: it takes a mask"
        if request.needs_lse and not request.chip.has_lse:
            yield f"no log-sum-exp on chip {request.chip.name}"
        yield from _block_sparse_limits(request)

    def arguments(self, given: Tensors, request: Request) -> dict[str, Any]:
        p, chip = request.problem, request.chip
        # Padded samples without a mask: every block, and the lengths say the rest.
        block = request.block if given.mask is not None else (chip.key_block, chip.key_block)
        return {
            "query": padded(given.q, chip),
            "key": padded(given.k, chip),
            "value": padded(given.v, chip),
            "block_sparse_mask": _eight_bit(given, block),
            "block_shape": list(block),
            "q_input_layout": "BNSD",
            "kv_input_layout": "BNSD",
            "num_key_value_heads": p.kv_heads,
            "scale_value": p.scale,
            "inner_precise": chip.inner_precise,
            "actual_seq_lengths": _from_one(given.q_lengths, p.q_len, p.batch),
            "actual_seq_lengths_kv": _from_one(given.kv_lengths, p.kv_len, p.batch),
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
        if request.has_lengths:
            yield "no samples of several lengths: it takes tokens of all samples in one row"
        yield from _block_sparse_limits(request)

    def arguments(self, given: Tensors, request: Request) -> dict[str, Any]:
        assert given.mask is not None
        p = request.problem
        blocks, counts = kept_blocks(given.mask)
        return {
            "query": _one_row(padded(given.q, request.chip)),
            "key": _one_row(padded(given.k, request.chip)),
            "value": _one_row(padded(given.v, request.chip)),
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
    is_sparse = False

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


def first_for(request: Request) -> Operator | None:
    """The first operator that can do it, None where none can."""
    return next((operator for operator in OPERATORS if not _reasons(operator, request)), None)


def operator_for(request: Request) -> Operator:
    """The first operator that can do it.

    Raises:
        LoweringError: none can; the message has the reasons.
    """
    able = first_for(request)
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
    p, chip = request.problem, request.chip
    if p.dtype not in chip.dtypes:
        yield f"no dtype {p.dtype} ({', '.join(chip.dtypes)})"
    if not request.is_dense and request.block[1] % chip.key_block:
        yield f"no key blocks of {request.block[1]} (multiples of {chip.key_block})"
    if p.head_dim > chip.head_dims[-1]:
        yield f"no head dim {p.head_dim} (at most {chip.head_dims[-1]})"


def fusion_limits(p: AttentionProblem) -> Iterator[str]:
    """What fusion attention does not take, whatever the mask."""
    longest = max(p.q_len, p.kv_len)
    if p.head_dim > LARGEST_HEAD_DIM:
        yield f"no head dim {p.head_dim} (at most {LARGEST_HEAD_DIM})"
    if p.heads > MOST_HEADS:
        yield f"no {p.heads} heads (at most {MOST_HEADS})"
    if longest > MOST_TOKENS:
        yield f"no {longest} tokens (at most {MOST_TOKENS})"


def padded(x: Tensor, chip: Chip) -> Tensor:
    """Zeros appended to the channels of ``[..., D]`` up to the next head dim of a chip.

    A channel that is zero in q and k adds nothing to a logit; one that is zero in v makes an output that is cut off.
    """
    missing = next(dim for dim in chip.head_dims if dim >= x.shape[-1]) - x.shape[-1]
    return pad(x, (0, missing)) if missing else x


def _eight_bit(given: Tensors, block: tuple[int, int]) -> Tensor:
    """The mask as 8-bit numbers, since nothing converts it on the way to CANN; ones where there is none."""
    if given.mask is not None:
        return given.mask.to(torch.int8)
    rows, columns = (-(-x.shape[2] // size) for x, size in zip((given.q, given.k), block, strict=True))
    return torch.ones((*given.q.shape[:2], rows, columns), dtype=torch.int8, device=given.q.device)


def _from_one(lengths: tuple[int, ...] | None, tokens: int, batch: int) -> list[int]:
    """Lengths within the tensor. None is below 1, which is not documented; what such a sample gives is set later."""
    return [tokens] * batch if lengths is None else [min(max(length, 1), tokens) for length in lengths]


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


def finite(x: Tensor) -> Tensor:
    """The same tensor with 0 in place of NaN and infinity.

    A dense kernel multiplies what is masked out by a weight of 0, and 0 times NaN is NaN: a bad number in a block that
    no row attends to would reach every row. So it is given finite numbers, and `spoiled` marks the rows that attend
    to a bad one.
    """
    return torch.where(x.isfinite(), x, 0)


def spoiled(
    out: Tensor, lse: Tensor | None, k: Tensor, v: Tensor, mask: Tensor, block: tuple[int, int]
) -> tuple[Tensor, Tensor | None]:
    """NaN where a query block attends to a key block that is not finite.

    A bad key spoils the row and its log-sum-exp, a bad value its own channel. They become NaN, also where dense
    attention would give an infinity.
    """
    bad_keys, bad_values = (_in_blocks(~x.isfinite(), block[1], mask.shape[1]) for x in (k, v))
    bad_keys = bad_keys.amax(dim=-1, keepdim=True)
    attended = mask.to(torch.float32)
    out = out.masked_fill(_of_tokens(attended @ (bad_keys + bad_values), block[0], out.shape[2]), torch.nan)
    if lse is not None:
        lse = lse.masked_fill(_of_tokens(attended @ bad_keys, block[0], out.shape[2]).squeeze(-1), torch.nan)
    return out, lse


def _in_blocks(is_bad: Tensor, block: int, heads: int) -> Tensor:
    """Above 0 where a key block has a bad number in that channel: float32 ``[B, H, key blocks, D]``."""
    share: Tensor = block_mean(is_bad.to(torch.float32), block=block)
    return share.repeat_interleave(heads // share.shape[1], dim=1)


def _of_tokens(rows: Tensor, block: int, length: int) -> Tensor:
    """Query blocks ``[B, H, q blocks, ...]`` above 0, token by token."""
    return (rows > 0).repeat_interleave(block, dim=2)[:, :, :length]
