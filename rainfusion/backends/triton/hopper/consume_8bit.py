"""A consumer of 8-bit operands: q and k in INT8 or FP8 (e4m3), weights and v in e4m3.

**Values stand transposed**, ``[D, 128 keys]``, for FP8 products of Hopper want keys contiguous, and their keys stand in
the order in which a thread's registers hold the weights (`quantise_blocks.KEY_ORDER`): weights become an operand of the
next product without a shuffle (ours).

**Integer logits are read as floats.** Their accumulator starts at the bits of 1.5 * 2^23, where adding an integer to
the bits adds it to the float; the offset goes away with the row maximum (ours).

**Weights** are rounded to e4m3 times 2^8, which uses its range up to 448 well; they are summed before they are rounded.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from rainfusion.backends.triton.hopper.softmax import NONE, accumulator, exp2, finite, multiplied, row_max
from rainfusion.backends.triton.hopper.stream import release, sync_warps, wait_full
from rainfusion.backends.triton.hopper.tiles import hear, hear_q_scale, heard, write

_DEPTH = gl.constexpr(32)
_WEIGHT_BITS = gl.constexpr(8.0)  # weights are kept times 2 to this power
_BITS = gl.constexpr(0x4B400000)  # 1.5 * 2^23 as a float
_OFFSET = gl.constexpr(12582912.0)
_LEAST_SCALE = gl.constexpr(1e-30)  # of logits; smaller ones are all alike, and a bias is divided by it


@gluon.jit
def consume_8bit(outs, rings, sizes, HALF: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, HIDES, MEANS):
    """Attend with one half of every tile's rows."""
    S_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(128, _DEPTH))
    hidden = rings.hidden.index(HALF)
    none = gl.full([64], NONE, gl.float32, S_ROW)
    it = 0
    t = 0
    tile = hear(rings.mail, t, hidden, HIDES)
    scale = hear_q_scale(rings.mail, t) * sizes.scale
    heard(rings.mail, t)
    wait_full(rings.q, t, 2)
    wait_full(rings.k, it, STAGES)
    q = rings.q.data.index(HALF).reshape([64, DIM])
    s = warpgroup_mma_wait(0, deps=(_logits(q, rings.k, it, DIM, STAGES),))
    x, peak, fade = _shifted(s, none, 0, tile, scale, rings, hidden, it, STAGES, HIDES, False)
    release(rings.k, it, STAGES)
    wait_full(rings.k, it + 1, STAGES, pred=tile.number >= 0)
    while tile.number >= 0:
        acc = gl.zeros([64, DIM], gl.float32, accumulator(DIM, _DEPTH))
        mass = gl.zeros([64], gl.float32, S_ROW)
        for j in range(1, tile.kept + sizes.mean_steps):
            sums = (acc, mass, peak, x, fade)
            acc, mass, peak, x, fade = _step(
                sums, q, rings, hidden, it, j, tile, scale, True, DIM, STAGES, HIDES, MEANS
            )
            it += 1
        release(rings.q, t, 2)
        t += 1
        done, done_peak = tile, peak
        tile = hear(rings.mail, t, hidden, HIDES)
        scale = hear_q_scale(rings.mail, t) * sizes.scale
        heard(rings.mail, t)
        wait_full(rings.q, t, 2)
        q = rings.q.data.index((t % 2) * 2 + HALF).reshape([64, DIM])
        sums, more = (acc, mass, none, x, fade), tile.number >= 0
        acc, mass, peak, x, fade = _step(sums, q, rings, hidden, it, 0, tile, scale, more, DIM, STAGES, HIDES, False)
        it += 1
        write(acc, mass, done_peak - _WEIGHT_BITS, outs, done, sizes, HALF, DIM, _DEPTH, HIDES)


@gluon.jit
def _step(sums, q, rings, hidden, it, j, tile, scale, more, DIM: gl.constexpr, STAGES: gl.constexpr, HIDES, MEANS):
    """Attend with the weights of step `it` of the stream while the logits of the next are made, step j of its tile."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, accumulator(DIM, _DEPTH), 4)
    acc, mass, peak, x, fade = sums
    s = _logits(q, rings.k, it + 1, DIM, STAGES)
    wait_full(rings.v, it, STAGES)
    p = exp2(x)
    mass = mass * fade + gl.sum(p, 1)
    fades = gl.convert_layout(fade, gl.SliceLayout(1, accumulator(DIM, _DEPTH)))
    acc = multiplied(acc, gl.expand_dims(fades, 1), DIM)
    p = p.to(gl.float8e4nv).reshape([64, 8, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, 128])
    v = rings.v.data.index(it % STAGES).reshape([DIM, 128]).permute((1, 0))
    acc = warpgroup_mma(gl.convert_layout(p, WEIGHTS), v, acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    x, peak, fade = _shifted(s, peak, j, tile, scale, rings, hidden, it + 1, STAGES, HIDES, MEANS)
    release(rings.k, it + 1, STAGES)  # not before: the bias of means lies in the slot of the keys
    # The spin of this wait ends a basic block; without it ptxas hoists the wait for wgmma above the maximum.
    wait_full(rings.k, it + 2, STAGES, pred=more)
    acc = warpgroup_mma_wait(0, deps=(acc,))  # Triton 3.6 takes no 8-bit operands here, such as the weights
    release(rings.v, it, STAGES)
    return acc, mass, peak, x, fade


@gluon.jit
def _logits(q, k_ring, it, DIM: gl.constexpr, STAGES: gl.constexpr):
    """q kᵀ, in flight; integers as the bits of floats, `_OFFSET` too large."""
    S: gl.constexpr = accumulator(128, _DEPTH)
    k = k_ring.data.index(it % STAGES).reshape([128, DIM]).permute((1, 0))
    INTEGER: gl.constexpr = k_ring.data.dtype == gl.int8
    if INTEGER:
        s = warpgroup_mma(q, k, gl.full([64, 128], _BITS, gl.int32, S), is_async=True)
    else:
        s = warpgroup_mma(q, k, gl.zeros([64, 128], gl.float32, S), use_acc=False, is_async=True)
    return s


@gluon.jit
def _shifted(s, peak, j, tile, scale, rings, hidden, it, STAGES: gl.constexpr, HIDES, MEANS):
    """Logits of step j less the row maximum and plus `_WEIGHT_BITS`, that maximum, and by how much it fades what came
    before; all in base 2.
    """
    S_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(128, _DEPTH))
    column: gl.constexpr = gl.SliceLayout(0, accumulator(128, _DEPTH))
    INTEGER: gl.constexpr = rings.k.data.dtype == gl.int8
    offset: gl.constexpr = _OFFSET if INTEGER else 0.0
    if INTEGER:
        s = s.to(gl.float32, bitcast=True)
    scale = rings.k_scale.index(it % (2 * STAGES)).reshape([64]).load(S_ROW) * scale
    scale = gl.where(scale < _LEAST_SCALE, _LEAST_SCALE, scale)
    if HIDES:
        if j == tile.ragged:
            s += gl.expand_dims(hidden.load(column), 0)
    if MEANS:
        if j >= tile.kept:
            bias = rings.bias.index(it % STAGES).reshape([128]).load(column)
            s += gl.expand_dims(bias, 0) / gl.expand_dims(scale, 1)
            fence_async_shared()  # the copy engine writes there next
            sync_warps()
    now = gl.maximum(peak, (row_max(s, S_ROW) - offset) * scale)
    below = finite(now) + (offset * scale - _WEIGHT_BITS)
    return s * gl.expand_dims(scale, 1) - gl.expand_dims(below, 1), now, exp2(peak - finite(now))
