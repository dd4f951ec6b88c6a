"""A consumer of 16-bit operands."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from rainfusion.backends.triton.hopper.softmax import NONE, accumulator, exp2, finite, rescaled, row_max
from rainfusion.backends.triton.hopper.stream import release, sync_warps, wait_full
from rainfusion.backends.triton.hopper.tiles import hear, heard, write

# A row's maximum may be exceeded by this much, in base 2, before its sums are rescaled (lazy rescaling, as in
# FlashAttention-4): float32 has the range for it.
_SLACK = gl.constexpr(8.0)
_DEPTH = gl.constexpr(16)


@gluon.jit
def consume(outs, rings, sizes, HALF: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, HIDES, MEANS):
    """Attend with one half of every tile's rows."""
    S_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(128, _DEPTH))
    hidden = rings.hidden.index(HALF)
    none = gl.full([64], NONE, gl.float32, S_ROW)
    it = 0
    t = 0
    tile = hear(rings.mail, t, hidden, HIDES)
    heard(rings.mail, t)
    wait_full(rings.q, t, 2)
    wait_full(rings.k, it, STAGES)
    q = rings.q.data.index(HALF).reshape([64, DIM])
    s = warpgroup_mma_wait(0, deps=(_logits(q, rings.k, it, DIM, STAGES),))
    release(rings.k, it, STAGES)
    x, peak, fade = _shifted(s, none, 0, tile, rings, hidden, it, sizes, STAGES, HIDES, False)
    wait_full(rings.k, it + 1, STAGES, pred=tile.number >= 0)
    while tile.number >= 0:
        acc = gl.zeros([64, DIM], gl.float32, accumulator(DIM, _DEPTH))
        mass = gl.zeros([64], gl.float32, S_ROW)
        for j in range(1, tile.kept + sizes.mean_steps):
            sums = (acc, mass, peak, x, fade)
            acc, mass, peak, x, fade = _step(
                sums, q, rings, hidden, it, j, tile, True, sizes, DIM, STAGES, HIDES, MEANS
            )
            it += 1
        release(rings.q, t, 2)
        t += 1
        done, done_peak = tile, peak
        tile = hear(rings.mail, t, hidden, HIDES)
        heard(rings.mail, t)
        wait_full(rings.q, t, 2)
        q = rings.q.data.index((t % 2) * 2 + HALF).reshape([64, DIM])
        sums, more = (acc, mass, none, x, fade), tile.number >= 0
        acc, mass, peak, x, fade = _step(sums, q, rings, hidden, it, 0, tile, more, sizes, DIM, STAGES, HIDES, False)
        it += 1
        write(acc, mass, done_peak, outs, done, sizes, HALF, DIM, _DEPTH, HIDES)


@gluon.jit
def _step(sums, q, rings, hidden, it, j, tile, more, sizes, DIM: gl.constexpr, STAGES: gl.constexpr, HIDES, MEANS):
    """Attend with the weights of step `it` of the stream while the logits of the next are made, step j of its tile."""
    acc, mass, peak, x, fade = sums
    s = _logits(q, rings.k, it + 1, DIM, STAGES)
    wait_full(rings.v, it, STAGES)
    p = exp2(x)
    mass = mass * fade + gl.sum(p, 1)
    fades = gl.convert_layout(fade, gl.SliceLayout(1, accumulator(DIM, _DEPTH)))
    acc = rescaled(acc, gl.expand_dims(fades, 1), DIM)
    p = gl.convert_layout(p.to(rings.v.data.dtype), gl.DotOperandLayout(0, accumulator(DIM, _DEPTH), 2))
    acc = warpgroup_mma(p, rings.v.data.index(it % STAGES).reshape([128, DIM]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    if not MEANS:
        release(rings.k, it + 1, STAGES)
    x, peak, fade = _shifted(s, peak, j, tile, rings, hidden, it + 1, sizes, STAGES, HIDES, MEANS)
    if MEANS:  # the bias lies in the slot of the keys
        release(rings.k, it + 1, STAGES)
    # The spin of this wait ends a basic block; without it ptxas hoists the wait for wgmma above the maximum.
    wait_full(rings.k, it + 2, STAGES, pred=more)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    release(rings.v, it, STAGES)
    return acc, mass, peak, x, fade


@gluon.jit
def _logits(q, k_ring, it, DIM: gl.constexpr, STAGES: gl.constexpr):
    """q kᵀ, in flight."""
    k = k_ring.data.index(it % STAGES).reshape([128, DIM]).permute((1, 0))
    zero = gl.zeros([64, 128], gl.float32, accumulator(128, _DEPTH))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _shifted(s, peak, j, tile, rings, hidden, it, sizes, STAGES: gl.constexpr, HIDES, MEANS):
    """Logits of step j less the row maximum, that maximum, and by how much it fades what came before; all in base 2.

    A maximum that grows little stays: `_SLACK` says how much float32 and the weights' dtype bear.
    """
    column: gl.constexpr = gl.SliceLayout(0, accumulator(128, _DEPTH))
    if HIDES:
        if j == tile.ragged:
            s += gl.expand_dims(hidden.load(column), 0)
    if MEANS:
        if j >= tile.kept:
            s += gl.expand_dims(rings.bias.index(it % STAGES).reshape([128]).load(column) * (1.0 / sizes.scale), 0)
            fence_async_shared()  # the copy engine writes there next
            sync_warps()
    highest = row_max(s, gl.SliceLayout(1, accumulator(128, _DEPTH))) * sizes.scale
    now = gl.where(highest > peak + _SLACK, highest, peak)
    return s * sizes.scale - gl.expand_dims(finite(now), 1), now, exp2(peak - finite(now))
