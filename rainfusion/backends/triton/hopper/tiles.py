"""Where a consumer's tile begins and ends: what the producer tells of it, and its rows in the caller's tensors."""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rainfusion.backends.triton.hopper.softmax import NONE, accumulator, finite
from rainfusion.backends.triton.hopper.stream import Tile, release, sync_warps, valid_keys, wait_full

_LN_2 = gl.constexpr(math.log(2.0))
_ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def hear(mail, t, hidden, HIDES: gl.constexpr):
    """What the producer tells of the t-th tile; `hidden` takes what is added to the logits of its ragged step."""
    wait_full(mail, t, 2)
    number = gl.max(mail.tile.index(t % 2).load(_ONE), 0)
    kept = gl.max(mail.kept.index(t % 2).load(_ONE), 0)
    ragged = gl.max(mail.ragged.index(t % 2).load(_ONE), 0)
    if HIDES:
        valid = gl.max(mail.valid.index(t % 2).load(_ONE), 0)
        hidden.store(gl.where(gl.arange(0, 128, _ONE) < valid, 0.0, NONE))
    return Tile(number, kept, ragged)


@gluon.jit
def hear_q_scale(mail, t):
    """The scale of the t-th tile's queries."""
    return gl.max(mail.q_scale.index(t % 2).load(_ONE), 0)


@gluon.jit
def heard(mail, t):
    """Let the producer tell of another tile."""
    sync_warps()  # one thread arrives for four warps, and not every Triton waits for the others by itself
    release(mail, t, 2)


@gluon.jit
def write(acc, mass, peak, outs, tile, sizes, HALF: gl.constexpr, DIM: gl.constexpr, DEPTH: gl.constexpr, HIDES):
    """Output, and log-sum-exp where it is wanted, to the caller's tokens.

    Args:
        acc, mass, peak: sums of weights times values ``[64, DIM]`` and of weights, and what logits were lessened by.
        DEPTH: of the accumulators' layouts.
    """
    S_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(128, DEPTH))
    O_COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(DIM, DEPTH))
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    bh = tile.number // sizes.q_blocks
    first = (tile.number % sizes.q_blocks) * 128 + HALF * 64
    empty = mass == 0.0
    if not HIDES:
        empty = empty | (tile.ragged >= 0)
    share = gl.convert_layout(gl.where(empty, 0.0, 1.0 / mass), gl.SliceLayout(1, accumulator(DIM, DEPTH)))
    result = acc * gl.expand_dims(share, 1)
    if outs.v_scale is not None:
        kv_head = bh // sizes.heads * (sizes.heads // sizes.group) + bh % sizes.heads // sizes.group
        channel = kv_head * DIM + gl.arange(0, DIM, O_COLUMN)
        centre = gl.expand_dims(gl.load(outs.v_centre + channel), 0)
        result = result * gl.expand_dims(gl.load(outs.v_scale + channel), 0)
        result = gl.where(gl.expand_dims(share == 0.0, 1), 0.0, result + centre)  # NaN stays NaN
    position, token, there = _tokens_of_rows(outs.order, first, sizes, gl.SliceLayout(1, WIDE))
    head = outs.out + (bh // sizes.heads).to(gl.int64) * outs.stride_b + (bh % sizes.heads).to(gl.int64) * outs.stride_h
    column = gl.arange(0, DIM, gl.SliceLayout(0, WIDE))
    at = gl.expand_dims(token.to(gl.int64) * outs.stride_n, 1) + gl.expand_dims(column, 0)
    result = gl.convert_layout(result.to(outs.out.dtype.element_ty), WIDE)
    end = sizes.q_len
    if outs.lengths is not None:  # queries beyond it attend to nothing
        end = valid_keys(outs.lengths, bh // sizes.heads, sizes.kv_len)
        result = gl.where(gl.expand_dims(position < end, 1), result, 0.0)
    gl.store(head + at, result, mask=gl.expand_dims(there, 1))
    if outs.lse is not None:
        position, token, there = _tokens_of_rows(outs.order, first, sizes, S_ROW)
        if outs.lengths is not None:
            empty = empty | (position >= end)
        natural = (finite(peak) + gl.log2(mass)) * _LN_2
        if outs.lse_shift is not None:
            shift = gl.load(outs.lse_shift + bh.to(gl.int64) * sizes.q_blocks * 128 + position)
            natural += shift * sizes.scale * _LN_2
        gl.store(outs.lse + bh.to(gl.int64) * sizes.q_len + token, gl.where(empty, NONE, natural), mask=there)


@gluon.jit
def _tokens_of_rows(order, first, sizes, LAYOUT: gl.constexpr):
    """The positions and the caller's tokens of a consumer's 64 rows, and which of them there are."""
    position = first + gl.arange(0, 64, LAYOUT)
    there = position < sizes.q_len
    token = position
    if order is not None:
        token = gl.load(order + position, mask=there, other=0)
    return position, token, there
