"""quantise: a tensor rounded to what 8 bits represent, with a scale for every block of tokens or every channel.

It returns the numbers that 8 bits and their scales stand for, not the bits, so that every backend can run it and
attention over its results is attention in 8 bits. A kernel that multiplies in 8 bits keeps the bits and computes the
same products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from array_api_compat import array_namespace
from array_api_compat import device as device_of

from rainfusion.core.checks import as_int, one_of, shown
from rainfusion.core.errors import PlanFormatError
from rainfusion.core.ops.base import Array, Op, ValueType, expect, operand, result
from rainfusion.core.ops.means import compute_dtype, compute_name, expect_lengths, expect_order
from rainfusion.core.ops.rounding import FORMATS, hadamard, is_power_of_two

_FLAGS = ("by_channel", "centred", "rotated")


@dataclass(frozen=True, kw_only=True)
class Quantise(Op):
    """``c + s * round((x - c) / s)``, float32 of the shape of x (float64 for float64).

    The scale s is the largest ``|x - c|`` of a group over the largest number of the format, and 1 where all are 0. NaN
    and infinity spread to their group, and where the centre is a mean, to the channel of their head.

    Operands:
        x: ``[B, H, tokens, D]``; order: the token at every block position, None where they stand in block order.
        lengths: int32 ``[B]``; tokens at positions at or beyond it take no part and become 0.
        centre: c, ``[B, H, D]``; absent: as `centred` says. scale: s of every channel, ``[B, H, D]``; absent: measured.

    Results:
        y: in the token order of x. y_centre: c. y_scale: s, ``[B, H, D]`` or ``[B, H, blocks]``.

    Attributes:
        format: ``"int8"`` or ``"e4m3"`` (OCP float8_e4m3fn).
        block: tokens that share one scale, all channels of a head together; None where a channel has one.
        by_channel: one scale a channel of a head, over all tokens.
        centred: c is the mean of every channel over the tokens (SageAttention's smoothing), otherwise 0.
        rotated: a Hadamard transform of the channels before rounding, undone after it (QuaRot, FlashAttention-3).
        tokens: that a row of x stands for in `lengths`: a block's where x holds means of blocks.
    """

    name: ClassVar[str] = "quantise"
    x: str = operand()
    order: str | None = operand(optional=True)
    lengths: str | None = operand(optional=True)
    centre: str | None = operand(optional=True)
    scale: str | None = operand(optional=True)
    y: str = result()
    y_centre: str | None = result(optional=True)
    y_scale: str | None = result(optional=True)
    format: str
    block: int | None = None
    by_channel: bool = False
    centred: bool = False
    rotated: bool = False
    tokens: int = 1

    def __post_init__(self) -> None:
        one_of(self.format, FORMATS, "format", PlanFormatError)
        for name in _FLAGS:
            flag = getattr(self, name)
            expect(isinstance(flag, bool), f"{name}={shown(flag)} is neither True nor False")
        expect((self.block is None) == self.by_channel, "quantise takes one of block and by_channel")
        expect(self.scale is None or self.by_channel, "quantise takes a scale with by_channel alone")
        if self.block is not None:
            as_int(self.block, "block", PlanFormatError)
        as_int(self.tokens, "tokens", PlanFormatError)

    def meaning(self, *operands: Array) -> tuple[Array, Array, Array]:
        return quantise(
            *operands,
            format=self.format,
            block=self.block,
            centred=self.centred,
            rotated=self.rotated,
            tokens=self.tokens,
        )

    def infer(self, types: Mapping[str, ValueType]) -> dict[str, ValueType]:
        x = types["x"]
        expect(len(x.shape) == 4, f"quantise reads [B, H, tokens, D]; {self.x} is {x}")
        batch, heads, length, dim = x.shape
        fits = is_power_of_two(dim) or not self.rotated
        expect(fits, f"{self.x} has {dim} channels; only a power of two of them is rotated: quantise without rotated")
        expect_order(types.get("order"), length, self.order)
        expect_lengths(types.get("lengths"), batch, self.lengths)
        channels = ValueType((batch, heads, dim), compute_name(x.dtype))
        for name in ("centre", "scale"):
            expect_channels(types.get(name), channels, getattr(self, name))
        scales = channels
        if self.block is not None:
            scales = ValueType((batch, heads, -(-length // self.block)), channels.dtype)
        return {"y": ValueType(x.shape, channels.dtype), "y_centre": channels, "y_scale": scales}

    def details(self) -> dict[str, Any]:
        words = [self.format, *(name for name in _FLAGS if getattr(self, name))]
        shown: dict[str, Any] = {"": " ".join(words)}
        if self.block is not None:
            shown["block"] = self.block
        if self.tokens > 1:
            shown["tokens"] = self.tokens
        return shown


def quantise(
    x: Array,
    order: Array | None = None,
    lengths: Array | None = None,
    centre: Array | None = None,
    scale: Array | None = None,
    *,
    format: str,
    block: int | None = None,
    centred: bool = False,
    rotated: bool = False,
    tokens: int = 1,
) -> tuple[Array, Array, Array]:
    """The definition of `Quantise`: y, its centre and its scale.

    Args:
        block: None for one scale a channel.
    """
    xp = array_namespace(x)
    batch, heads, length, dim = x.shape
    block = None if block is None else min(block, length)  # memory is that of the tokens, whatever a plan says
    ordered = xp.astype(x if order is None else xp.take(x, order, axis=2), compute_dtype(x, xp), copy=False)
    valid = None
    if lengths is not None:
        position = xp.arange(length, device=device_of(x)) * tokens
        valid = (position < lengths[:, None])[:, None, :, None]
        ordered = xp.where(valid, ordered, xp.zeros_like(ordered))
    if centre is None:
        zero = xp.zeros((batch, heads, dim), dtype=ordered.dtype, device=device_of(x))
        centre = _mean(ordered, valid, xp) if centred else zero
    moved = ordered - centre[:, :, None, :]
    if rotated:
        moved = hadamard(moved, xp)
    if valid is not None:
        moved = xp.where(valid, moved, xp.zeros_like(moved))
    if block is not None:
        block = min(block, length)  # padding is never more than there are tokens
    of_format = FORMATS[format]
    if scale is None:
        largest = xp.max(xp.abs(moved), axis=2) if block is None else _largest_of_blocks(moved, block, xp)
        scale = largest / of_format.top
        scale = xp.where(scale == 0, xp.ones_like(scale), scale)
    each = scale[:, :, None, :] if block is None else _of_tokens(scale, block, length, xp)
    rounded = of_format.rounded(moved / each, xp) * each
    y = centre[:, :, None, :] + (hadamard(rounded, xp) if rotated else rounded)
    if valid is not None:
        y = xp.where(valid, y, xp.zeros_like(y))
    return y if order is None else xp.take(y, xp.argsort(order), axis=2), centre, scale


def expect_channels(given: ValueType | None, wanted: ValueType, name: str | None) -> None:
    """Refuse what is not one number for every channel of a head."""
    expect(given is None or given == wanted, f"{name} is {given}; one number a channel is {wanted}")


def _mean(x: Array, valid: Array | None, xp: Any) -> Array:
    """Of every channel over the valid tokens; the others are 0 already."""
    total = xp.sum(x, axis=2)
    if valid is None:
        return total / x.shape[2]
    return total / xp.clip(xp.sum(xp.astype(valid, x.dtype), axis=2), min=1)


def _largest_of_blocks(x: Array, block: int, xp: Any) -> Array:
    """The largest magnitude of every block of tokens, ``[B, H, blocks]``."""
    batch, heads, length, _ = x.shape
    largest = xp.max(xp.abs(x), axis=3)
    missing = -length % block
    if missing:
        padding = xp.zeros((batch, heads, missing), dtype=x.dtype, device=device_of(x))
        largest = xp.concat([largest, padding], axis=2)
    return xp.max(xp.reshape(largest, (batch, heads, (length + missing) // block, block)), axis=3)


def _of_tokens(scale: Array, block: int, length: int, xp: Any) -> Array:
    """The scale of every token's block, ``[B, H, tokens, 1]``."""
    batch, heads, blocks = scale.shape
    each = xp.broadcast_to(scale[..., None], (batch, heads, blocks, block))
    return xp.reshape(each, (batch, heads, blocks * block))[:, :, :length, None]
