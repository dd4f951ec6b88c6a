"""block_mean and block_score: the means of blocks of tokens, and the logits between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from array_api_compat import array_namespace
from array_api_compat import device as device_of

from rainfusion.core.checks import as_int, as_number
from rainfusion.core.errors import PlanFormatError
from rainfusion.core.ops.base import Array, Op, ValueType, expect, operand, result


@dataclass(frozen=True, kw_only=True)
class BlockMean(Op):
    """Mean of every block of tokens (RainFusion2.0, block means): float32 ``[B, H, blocks, D]``, float64 for float64.

    Operands:
        x: ``[B, H, tokens, D]``; order: the token at every block position, None where they stand in block order.
        lengths: int32 ``[B]``; only tokens at positions below it count, and a block without any has mean 0.
    """

    name: ClassVar[str] = "block_mean"
    x: str = operand()
    order: str | None = operand(optional=True)
    lengths: str | None = operand(optional=True)
    mean: str = result()
    block: int

    def __post_init__(self) -> None:
        as_int(self.block, "block", PlanFormatError)

    def meaning(self, x: Array, order: Array | None, lengths: Array | None) -> Array:
        return block_mean(x, order, lengths, block=self.block)

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        x = types["x"]
        expect(len(x.shape) == 4, f"block_mean reads [B, H, tokens, D]; {self.x} is {x}")
        expect_order(types.get("order"), x.shape[2], self.order)
        expect_lengths(types.get("lengths"), x.shape[0], self.lengths)
        batch, heads, length, dim = x.shape
        return {"mean": ValueType((batch, heads, -(-length // self.block), dim), compute_name(x.dtype))}


@dataclass(frozen=True, kw_only=True)
class BlockScore(Op):
    """Logits between block means, ``[B, H, q blocks, key blocks]``: softmax is monotone, so ranking needs none.

    Operands:
        qb: ``[B, H, q blocks, D]``; kb: ``[B, H or fewer, key blocks, D]``.
        prior: added to the logits, float32 ``[q blocks, key blocks]`` or ``[H, q blocks, key blocks]``.
    """

    name: ClassVar[str] = "block_score"
    qb: str = operand()
    kb: str = operand()
    prior: str | None = operand(optional=True)
    score: str = result()
    scale: float

    def __post_init__(self) -> None:
        as_number(self.scale, "scale", PlanFormatError, "a number")

    def meaning(self, qb: Array, kb: Array, prior: Array | None) -> Array:
        return block_score(qb, kb, prior, scale=self.scale)

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        qb, kb = types["qb"], types["kb"]
        fits = len(qb.shape) == len(kb.shape) == 4 and qb.dtype == kb.dtype
        fits = fits and (qb.shape[0], qb.shape[3]) == (kb.shape[0], kb.shape[3]) and qb.shape[1] % kb.shape[1] == 0
        expect(fits, f"block_score reads means of one problem; {self.qb} is {qb}, {self.kb} is {kb}")
        batch, heads, rows, columns = *qb.shape[:3], kb.shape[2]
        prior = types.get("prior")
        allowed = ((rows, columns), (1, rows, columns), (heads, rows, columns))
        expect(prior is None or prior.shape in allowed, f"{self.prior} is {prior}; give {list(allowed[0])}")
        return {"score": ValueType((batch, heads, rows, columns), qb.dtype)}


def block_mean(x: Array, order: Array | None = None, lengths: Array | None = None, *, block: int) -> Array:
    """The definition of `BlockMean`. A ragged last block is the mean of the tokens it has."""
    xp = array_namespace(x)
    batch, heads, length, dim = x.shape
    ordered = x if order is None else xp.take(x, order, axis=2)
    if lengths is not None:
        return _mean_of_valid(ordered, lengths, block, xp)
    whole = length // block * block
    dtype = compute_dtype(x, xp)
    folded = xp.reshape(ordered[:, :, :whole, :], (batch, heads, whole // block, block, dim))
    means = xp.sum(folded, axis=3, dtype=dtype) / block
    if whole == length:
        return means
    tail = xp.sum(ordered[:, :, whole:, :], axis=2, keepdims=True, dtype=dtype) / (length - whole)
    return xp.concat([means, tail], axis=2)


def _mean_of_valid(ordered: Array, lengths: Array, block: int, xp: Any) -> Array:
    batch, heads, length, dim = ordered.shape
    block = min(block, length)  # memory is that of the tokens, whatever a plan says
    position = xp.arange(length, device=device_of(ordered))
    valid = position < lengths[:, None]
    kept = xp.where(valid[:, None, :, None], ordered, xp.zeros_like(ordered))
    missing = -length % block
    if missing:
        padding = xp.zeros((batch, heads, missing, dim), dtype=ordered.dtype, device=device_of(ordered))
        kept = xp.concat([kept, padding], axis=2)
    blocks = (length + missing) // block
    dtype = compute_dtype(ordered, xp)
    sums = xp.sum(xp.reshape(kept, (batch, heads, blocks, block, dim)), axis=3, dtype=dtype)
    counts = xp.astype(valid_counts(lengths, length, block, xp), dtype)
    return sums / xp.clip(counts, min=1)[:, None, :, None]


def block_score(qb: Array, kb: Array, prior: Array | None = None, *, scale: float) -> Array:
    """The definition of `BlockScore`."""
    xp = array_namespace(qb, kb)
    batch, heads, rows, dim = qb.shape
    kv_heads, columns = kb.shape[1], kb.shape[2]
    grouped = xp.reshape(qb, (batch, kv_heads, heads // kv_heads * rows, dim))
    scores = xp.reshape((grouped @ xp.matrix_transpose(kb)) * scale, (batch, heads, rows, columns))
    return scores if prior is None else scores + xp.astype(prior, scores.dtype, copy=False)


def valid_counts(lengths: Array, length: int, block: int, xp: Any) -> Array:
    """Tokens of every block that lie below each sample's length, int ``[B, blocks]``."""
    start = xp.arange(-(-length // block), device=device_of(lengths)) * block
    size = xp.clip(length - start, max=block)
    return xp.minimum(xp.clip(lengths[:, None] - start, min=0), size)


def log_counts(length: int, block: int, like: Array, xp: Any) -> Array:
    """The log of every block's tokens, ``[blocks]``, made where `like` is, without a copy from the host."""
    blocks = -(-length // block)
    last = math.log(length - (blocks - 1) * block)
    counts = xp.full((blocks,), math.log(block), dtype=like.dtype, device=device_of(like))
    return xp.where(xp.arange(blocks, device=device_of(like)) == blocks - 1, xp.full_like(counts, last), counts)


def compute_dtype(x: Array, xp: Any) -> Any:
    """The dtype that an array is computed in: float64 for float64, float32 for all others."""
    return xp.float64 if x.dtype == xp.float64 else xp.float32


def compute_name(dtype: str) -> str:
    """`compute_dtype` by name."""
    return "float64" if dtype == "float64" else "float32"


def expect_order(given: ValueType | None, length: int, name: str | None) -> None:
    """Refuse an order that is not one integer for every token."""
    fits = given is None or (given.shape == (length,) and given.dtype in ("int64", "int32"))
    expect(fits, f"{name} is {given}; an order of {length} tokens is int64 [{length}]")


def expect_lengths(given: ValueType | None, batch: int, name: str | None) -> None:
    """Refuse lengths that are not one integer for every sample."""
    fits = given is None or (given.shape == (batch,) and given.dtype in ("int64", "int32"))
    expect(fits, f"{name} is {given}; lengths of {batch} samples are int32 [{batch}]")
