"""attend on Hopper, in Triton's Gluon: one producer warp feeds two consumer warpgroups.

A program stays on its multiprocessor and takes tiles (128 query rows of one head) off a shared counter, heavy ones
first, until none is left. Inside it

- the **producer** takes tiles, walks their lists of key blocks, and has the copy engine (TMA) fetch q, k and v into
  rings of shared memory;
- two **consumers** hold 64 rows each and keep the tensor cores (wgmma) busy: the exponentials of step j run under
  q kᵀ of step j+1, and the row maximum of step j+1 under p v of step j. Step j+1 may belong to the next tile: the
  stream of steps does not pause between tiles.

Warp specialisation and the overlap of softmax with products follow FlashAttention-3 (arXiv 2407.08608); splitting the
softmax into maximum and exponentials that overlap different products, and rescaling only where a maximum grows by more
than a threshold, follow FlashAttention-4.

The means of the omitted blocks (AttendMeans) come last in a tile, 128 of them a step. Output and log-sum-exp go
straight to the caller's tokens.

**Keys that take no part.** Some keys of a tile's last block may lie beyond the end: of the keys, or of the valid ones
where samples have lengths. The producer tells the consumers which step that is and how many keys of it count. A tile
that keeps nothing takes one step, of which no key counts, over a block beyond the end, which the copy engine reads as
zeros: consumers expect a first step in every tile. Hiding keys costs a branch a step, so it is compiled only where
there may be some to hide; without, zeros alone make the output 0, and only the log-sum-exp looks at emptiness.

**Where a walk begins (ours).** Programs drift apart, and before long they read all over a head's keys. Where the head
outgrows the cache, each then fetches from memory what another fetched before. So lists are walked as rings: P programs
take a tile every P-th of a walk, and the p-th tile begins p/P of a round in, which is where the others are by then. It
depends on p alone, not on timing: results are the same bits every time.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rainfusion.backends.triton.operands import LOG2_E, Attention

ROWS, KEYS = 128, 128
HEAD_DIMS = (64, 128)
STAGES = 2  # slots of the rings of k and v
_LN_2 = gl.constexpr(math.log(2.0))
_NONE = gl.constexpr(float("-inf"))
# A row's maximum may be exceeded by this much, in base 2, before its sums are rescaled (lazy rescaling, as in
# FlashAttention-4): float32 has the range for it.
_SLACK = gl.constexpr(8.0)
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.7 renamed it
_sync_warps = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed as well


def attend_hopper(given: Attention, out: Tensor, lse: Tensor | None) -> None:
    """Write attention over the listed blocks to `out`, ``[B, H, q_len, D]``, and its log-sum-exp to `lse`.

    Args:
        given: in float16 or bfloat16 (means too), head dim 64 or 128, blocks of 128x128, scale above 0; q, k and v
            as `can_fetch` wants them.
        lse: float32 ``[B, H, q_len]`` contiguous, or None.
    """
    q, k, v, means, lists = given.q, given.k, given.v, given.means, given.lists
    heads, dim = q.shape[1], q.shape[3]
    tiles = given.tiles.numel()
    hides = given.kv_len % KEYS != 0 or given.lengths is not None or (given.may_keep_nothing and means is not None)
    programs = min(tiles, _properties(q.device).multi_processor_count)
    _attend[(programs,)](
        _tokens(q, given.q_len, ROWS // 2),
        _tokens(k, given.kv_len, KEYS),
        _tokens(v, given.kv_len, KEYS),
        None if means is None else _tokens(means.k, given.kv_blocks, KEYS),
        None if means is None else _tokens(means.v, given.kv_blocks, KEYS),
        None if lists.bias is None else _bias(lists.bias),
        out,
        lse,
        given.out_order,
        given.lengths,
        given.tiles,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        lists.counts,
        lists.indices,
        *out.stride()[:3],
        given.q_len,
        given.kv_len,
        tiles,
        heads,
        heads // k.shape[1],
        given.q_blocks,
        given.kv_blocks,
        0 if means is None else -(-given.kv_blocks // KEYS),
        programs if _outgrows_cache(k, given.kv_len) else 1,
        *lists.strides,
        given.scale * LOG2_E,
        DIM=dim,
        STAGES=STAGES,
        HIDES=hides,
        EMPTIES=given.may_keep_nothing or given.lengths is not None,
        LENGTHS_ON_QUERIES=given.lengths is not None and given.lengths_on_queries,
        num_warps=4,
        enable_fp_fusion=True,
    )


def can_fetch(x: Tensor) -> bool:
    """Whether the copy engine can read ``[B, H, tokens, D]`` where it lies: addresses in steps of 16 bytes."""
    steps = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in steps)
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and aligned


def _tokens(x: Tensor, length: int, rows: int) -> TensorDescriptor:
    """Runs of `rows` tokens of one head; what lies beyond `length` tokens is read as zero."""
    batch, heads, _, dim = x.shape
    strides = [stride if size > 1 else 8 * dim for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(
        x, [batch, heads, length, dim], [*strides, 1], [1, 1, rows, dim], _layout(rows, dim, x.dtype)
    )


@lru_cache
def _layout(rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(
        [1, 1, rows, dim], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    )


def _bias(bias: Tensor) -> TensorDescriptor:
    """Runs of `KEYS` columns of one row."""
    return TensorDescriptor(bias, list(bias.shape), list(bias.stride()), [1, KEYS], gl.NVMMASharedLayout(0, 32, 2))


def _outgrows_cache(k: Tensor, kv_len: int) -> bool:
    """Whether keys and values of one head are more than half of the second-level cache, the part near a program."""
    return 2 * kv_len * k.shape[3] * k.element_size() > int(_properties(k.device).L2_cache_size) // 2


@lru_cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


# -- what the parts of the kernel share ------------------------------------------------------------------


class Ring(NamedTuple):
    """Slots of shared memory with a barrier for 'filled' and one for 'free again' each."""

    data: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


class Tile(NamedTuple):
    """One query block of one head: its number, -1 after the last; how many steps its key blocks take; the step of
    which some keys (of a tile that keeps nothing, all) do not count, -1 where all do.
    """

    number: gl.tensor
    kept: gl.tensor
    ragged: gl.tensor


class Mail(NamedTuple):
    """Two slots in which the producer tells the consumers of a tile, as in `Tile`, and how many keys of the ragged step
    count.
    """

    tile: gl.shared_memory_descriptor
    kept: gl.shared_memory_descriptor
    ragged: gl.shared_memory_descriptor
    valid: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


class Lists(NamedTuple):
    """The tiles in the order in which they are taken, the kept blocks of each, and the valid keys of every sample."""

    tiles: gl.tensor
    counter: gl.tensor
    counts: gl.tensor
    indices: gl.tensor
    lengths: gl.tensor
    count_stride: gl.tensor
    index_stride: gl.tensor


class Sizes(NamedTuple):
    """Lengths, heads and blocks of the call; `mean_steps` runs of means follow the kept blocks of a tile, whose walk
    begins at one of `phases` places.
    """

    q_len: gl.tensor
    kv_len: gl.tensor
    tiles: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    q_blocks: gl.tensor
    kv_blocks: gl.tensor
    mean_steps: gl.tensor
    phases: gl.tensor
    scale: gl.tensor


@gluon.jit
def _barriers(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Barriers of `SLOTS` slots; a slot is free again when all its readers have said so."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=READERS)
    return full, free


@gluon.jit
def _wait_full(ring, it, SLOTS: gl.constexpr, pred=True):
    mbarrier.wait(ring.full.index(it % SLOTS), (it // SLOTS) & 1, pred=pred)


@gluon.jit
def _wait_free(ring, it, SLOTS: gl.constexpr):
    mbarrier.wait(ring.free.index(it % SLOTS), ((it // SLOTS) & 1) ^ 1)


@gluon.jit
def _attend(
    q_desc,
    k_desc,
    v_desc,
    mean_k_desc,
    mean_v_desc,
    bias_desc,
    out,
    lse,
    out_order,
    lengths,
    tiles,
    counter,
    counts,
    indices,
    out_b,
    out_h,
    out_n,
    q_len,
    kv_len,
    tile_count,
    heads,
    group,
    q_blocks,
    kv_blocks,
    mean_steps,
    phases,
    count_stride,
    index_stride,
    scale,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    HIDES: gl.constexpr,
    EMPTIES: gl.constexpr,
    LENGTHS_ON_QUERIES: gl.constexpr,
):
    number: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_full, q_free = _barriers(2, 2)
    k_full, k_free = _barriers(STAGES, 2)
    v_full, v_free = _barriers(STAGES, 2)
    mail_full, mail_free = _barriers(2, 2)
    q_ring = Ring(gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, 64, DIM], q_desc.layout), q_full, q_free)
    k_ring = Ring(gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 128, DIM], k_desc.layout), k_full, k_free)
    v_ring = Ring(gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, 128, DIM], v_desc.layout), v_full, v_free)
    mail = Mail(
        gl.allocate_shared_memory(gl.int32, [2, 1], number),
        gl.allocate_shared_memory(gl.int32, [2, 1], number),
        gl.allocate_shared_memory(gl.int32, [2, 1], number),
        gl.allocate_shared_memory(gl.int32, [2, 1], number),
        mail_full,
        mail_free,
    )
    MEANS: gl.constexpr = bias_desc is not None
    bias = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], gl.NVMMASharedLayout(0, 32, 2))
    hidden = gl.allocate_shared_memory(gl.float32, [2, 128], number)
    rings = (q_ring, k_ring, v_ring, bias, hidden, mail)
    lists = Lists(tiles, counter, counts, indices, lengths, count_stride, index_stride)
    sizes = Sizes(q_len, kv_len, tile_count, heads, group, q_blocks, kv_blocks, mean_steps, phases, scale)
    outs = (out, lse, out_order, lengths if LENGTHS_ON_QUERIES else None, out_b, out_h, out_n)
    sources = (q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc, bias_desc)
    gl.warp_specialize(
        [
            (_consume, (outs, rings, sizes, 0, DIM, STAGES, HIDES, MEANS)),
            (_consume, (outs, rings, sizes, 1, DIM, STAGES, HIDES, MEANS)),
            (_produce, (sources, rings, lists, sizes, STAGES, MEANS, HIDES, EMPTIES, LENGTHS_ON_QUERIES)),
        ],
        [4, 1],
        [240, 24],
    )


# -- producer --------------------------------------------------------------------------------------------


@gluon.jit
def _produce(sources, rings, lists, sizes, STAGES: gl.constexpr, MEANS: gl.constexpr, HIDES, EMPTIES, ON_QUERIES):
    q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc, bias_desc = sources
    q_ring, k_ring, v_ring, bias, _, mail = rings
    it = 0
    t = 0
    taken, tile, count, begin, block = _take_tile(lists, sizes, EMPTIES, ON_QUERIES)
    going = True
    while going:
        going = taken < sizes.tiles
        bh = tile // sizes.q_blocks
        b, h = bh // sizes.heads, bh % sizes.heads
        head = (b, h // sizes.group)
        listed = lists.indices + tile.to(gl.int64) * lists.index_stride
        kept = gl.maximum(count, 1)  # a tile that keeps nothing takes a step over nothing
        steps = kept + sizes.mean_steps
        _tell(mail, t, gl.where(going, tile, -1), b, count, begin, listed, lists.lengths, sizes, HIDES)
        _fill(k_ring, it, k_desc, head, block * 128, STAGES)
        _wait_free(q_ring, t, 2)
        mbarrier.expect(q_ring.full.index(t % 2), 2 * q_desc.block_type.nbytes)
        first_row = (tile % sizes.q_blocks) * 128
        if EMPTIES and not MEANS:  # queries that attend to nothing are read as zeros too: NaN times 0 would be NaN
            first_row = gl.where(count > 0, first_row, sizes.q_blocks * 128)
        for half in gl.static_range(2):
            row = first_row + half * 64
            _fetch(q_desc, [b, h, row, 0], q_ring.full.index(t % 2), q_ring.data.index((t % 2) * 2 + half))
        if going:
            current, last, first, current_block = tile, kept - 1, begin, block
            taken, tile, count, begin, block = _take_tile(lists, sizes, EMPTIES, ON_QUERIES)
            for j in range(1, steps + 1):
                at = first + gl.minimum(j, last)
                following = gl.load(listed + gl.where(at > last, at - last - 1, at))
                mean = (j - 1 - last) * 128  # the first of the means of step j, if these have begun
                if j < steps:
                    if MEANS and mean >= 0:
                        _fill_biased(k_ring, it + 1, mean_k_desc, head, mean, bias_desc, bias, current, STAGES)
                    else:
                        _fill(k_ring, it + 1, k_desc, head, following * 128, STAGES)
                if MEANS and mean > 0:
                    _fill(v_ring, it, mean_v_desc, head, mean - 128, STAGES)
                else:
                    _fill(v_ring, it, v_desc, head, current_block * 128, STAGES)
                current_block = following
                it += 1
            t += 1


@gluon.jit
def _take_tile(lists, sizes, EMPTIES: gl.constexpr, ON_QUERIES: gl.constexpr):
    """The next tile off the counter, how many blocks it keeps, where in their list its walk begins and that block.

    Beyond the last tile it is the last tile again, whose first block and queries are fetched and not used: the
    consumers look one step ahead, and this gives them something to see.
    """
    taken = gl.atomic_add(lists.counter, 1, sem="relaxed")
    tile = gl.load(lists.tiles + gl.minimum(taken, sizes.tiles - 1))
    count = gl.load(lists.counts + tile * lists.count_stride)
    if lists.lengths is not None:  # lists hold no block without a valid key, except for the one that all rows share
        end = _end(lists.lengths, tile // sizes.q_blocks // sizes.heads, sizes.kv_len)
        count = gl.minimum(count, (end + 127) // 128)
        if ON_QUERIES:
            count = gl.where(tile % sizes.q_blocks * 128 < end, count, 0)
    begin = count * (taken % sizes.phases) // sizes.phases
    block = gl.load(lists.indices + tile.to(gl.int64) * lists.index_stride + begin)
    if EMPTIES:
        block = gl.where(count > 0, block, sizes.kv_blocks)
    return taken, tile, count, begin, block


@gluon.jit
def _end(lengths, sample, kv_len):
    """The valid keys of a sample."""
    return gl.maximum(gl.minimum(gl.load(lengths + sample).to(gl.int32), kv_len), 0)


@gluon.jit
def _tell(mail, t, tile, sample, count, begin, listed, lengths, sizes, HIDES: gl.constexpr):
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    kept = gl.maximum(count, 1)
    last = gl.load(listed + kept - 1)
    end = sizes.kv_len
    if lengths is not None:
        end = _end(lengths, sample, sizes.kv_len)
    valid = gl.where(count > 0, end - last * 128, 0)
    _wait_free(mail, t, 2)
    mail.tile.index(t % 2).store(gl.full([1], tile, gl.int32, one))
    mail.kept.index(t % 2).store(gl.full([1], kept, gl.int32, one))
    mail.ragged.index(t % 2).store(gl.full([1], gl.where(valid < 128, kept - 1 - begin, -1), gl.int32, one))
    if HIDES:
        mail.valid.index(t % 2).store(gl.full([1], valid, gl.int32, one))
    mbarrier.arrive(mail.full.index(t % 2), count=1)


@gluon.jit
def _fill(ring, it, desc, head, first, STAGES: gl.constexpr):
    """Fetch 128 rows of a head into the slot of step `it`."""
    _wait_free(ring, it, STAGES)
    full = ring.full.index(it % STAGES)
    mbarrier.expect(full, desc.block_type.nbytes)
    _fetch(desc, [head[0], head[1], first, 0], full, ring.data.index(it % STAGES))


@gluon.jit
def _fill_biased(ring, it, desc, head, first, bias_desc, bias, tile, STAGES: gl.constexpr):
    """Fetch 128 means of a head and what is added to their logits."""
    _wait_free(ring, it, STAGES)
    full = ring.full.index(it % STAGES)
    mbarrier.expect(full, desc.block_type.nbytes + bias_desc.block_type.nbytes)
    _fetch(desc, [head[0], head[1], first, 0], full, ring.data.index(it % STAGES))
    _fetch(bias_desc, [tile, first], full, bias.index(it % STAGES))


# -- consumers -------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _accumulator(columns):
    """The layout of a [64, columns] product of one warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def _consume(outs, rings, sizes, HALF: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, HIDES, MEANS):
    S_ROW: gl.constexpr = gl.SliceLayout(1, _accumulator(128))
    q_ring, k_ring, v_ring, bias, hidden, mail = rings
    hidden = hidden.index(HALF)
    rings = (q_ring, k_ring, v_ring, bias, hidden, mail)
    none = gl.full([64], _NONE, gl.float32, S_ROW)
    it = 0
    t = 0
    tile = _hear(mail, t, hidden, HIDES)
    _wait_full(q_ring, t, 2)
    _wait_full(k_ring, it, STAGES)
    q = q_ring.data.index(HALF).reshape([64, DIM])
    s = warpgroup_mma_wait(0, deps=(_logits(q, k_ring, it, DIM, STAGES),))
    mbarrier.arrive(k_ring.free.index(it % STAGES), count=1)
    x, peak, fade = _shifted(s, none, 0, tile, rings, it, sizes, STAGES, HIDES, False)
    _wait_full(k_ring, it + 1, STAGES, pred=tile.number >= 0)
    while tile.number >= 0:
        acc = gl.zeros([64, DIM], gl.float32, _accumulator(DIM))
        mass = gl.zeros([64], gl.float32, S_ROW)
        for j in range(1, tile.kept + sizes.mean_steps):
            sums = (acc, mass, peak, x, fade)
            acc, mass, peak, x, fade = _step(sums, q, rings, it, j, tile, True, sizes, DIM, STAGES, HIDES, MEANS)
            it += 1
        mbarrier.arrive(q_ring.free.index(t % 2), count=1)
        t += 1
        done, done_peak = tile, peak
        tile = _hear(mail, t, hidden, HIDES)
        _wait_full(q_ring, t, 2)
        q = q_ring.data.index((t % 2) * 2 + HALF).reshape([64, DIM])
        sums, more = (acc, mass, none, x, fade), tile.number >= 0
        acc, mass, peak, x, fade = _step(sums, q, rings, it, 0, tile, more, sizes, DIM, STAGES, HIDES, False)
        it += 1
        _write(acc, mass, done_peak, outs, done, sizes, HALF, DIM, HIDES)


@gluon.jit
def _hear(mail, t, hidden, HIDES: gl.constexpr):
    """What the producer tells of the t-th tile; `hidden` takes what is added to the logits of its ragged step."""
    _wait_full(mail, t, 2)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    number = gl.max(mail.tile.index(t % 2).load(one), 0)
    kept = gl.max(mail.kept.index(t % 2).load(one), 0)
    ragged = gl.max(mail.ragged.index(t % 2).load(one), 0)
    if HIDES:
        valid = gl.max(mail.valid.index(t % 2).load(one), 0)
        hidden.store(gl.where(gl.arange(0, 128, one) < valid, 0.0, _NONE))
    _sync_warps()  # one thread arrives for four warps, and not every Triton waits for the others by itself
    mbarrier.arrive(mail.free.index(t % 2), count=1)
    return Tile(number, kept, ragged)


@gluon.jit
def _step(sums, q, rings, it, j, tile, more, sizes, DIM: gl.constexpr, STAGES: gl.constexpr, HIDES, MEANS):
    """Attend with the weights of step `it` of the stream while the logits of the next are made, step j of its tile."""
    acc, mass, peak, x, fade = sums
    _, k_ring, v_ring, _, _, _ = rings
    s = _logits(q, k_ring, it + 1, DIM, STAGES)
    _wait_full(v_ring, it, STAGES)
    p = _exp2(x)
    mass = mass * fade + gl.sum(p, 1)
    acc = _rescaled(acc, gl.convert_layout(fade, gl.SliceLayout(1, _accumulator(DIM))), DIM)
    p = gl.convert_layout(p.to(v_ring.data.dtype), gl.DotOperandLayout(0, _accumulator(DIM), 2))
    acc = warpgroup_mma(p, v_ring.data.index(it % STAGES).reshape([128, DIM]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    if not MEANS:
        mbarrier.arrive(k_ring.free.index((it + 1) % STAGES), count=1)
    x, peak, fade = _shifted(s, peak, j, tile, rings, it + 1, sizes, STAGES, HIDES, MEANS)
    if MEANS:  # the bias lies in the slot of the keys
        mbarrier.arrive(k_ring.free.index((it + 1) % STAGES), count=1)
    # The spin of this wait ends a basic block; without it ptxas hoists the wait for wgmma above the maximum.
    _wait_full(k_ring, it + 2, STAGES, pred=more)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(v_ring.free.index(it % STAGES), count=1)
    return acc, mass, peak, x, fade


@gluon.jit
def _logits(q, k_ring, it, DIM: gl.constexpr, STAGES: gl.constexpr):
    """q kᵀ, in flight."""
    k = k_ring.data.index(it % STAGES).reshape([128, DIM]).permute((1, 0))
    zero = gl.zeros([64, 128], gl.float32, _accumulator(128))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _shifted(s, peak, j, tile, rings, it, sizes, STAGES: gl.constexpr, HIDES, MEANS):
    """Logits of step j less the row maximum, that maximum, and by how much it fades what came before; all in base 2.

    A maximum that grows little stays: `_SLACK` says how much float32 and the weights' dtype bear.
    """
    _, _, _, bias, hidden, _ = rings
    column: gl.constexpr = gl.SliceLayout(0, _accumulator(128))
    if HIDES:
        if j == tile.ragged:
            s += gl.expand_dims(hidden.load(column), 0)
    if MEANS:
        if j >= tile.kept:
            s += gl.expand_dims(bias.index(it % STAGES).reshape([128]).load(column) * (1.0 / sizes.scale), 0)
            fence_async_shared()  # the copy engine writes there next
            _sync_warps()
    highest = _row_max(s, gl.SliceLayout(1, _accumulator(128))) * sizes.scale
    now = gl.where(highest > peak + _SLACK, highest, peak)
    return s * sizes.scale - gl.expand_dims(_finite(now), 1), now, _exp2(peak - _finite(now))


@gluon.jit
def _row_max(s, ROW: gl.constexpr):
    """Row maximum as a tree over registers; Triton's own reduction is one serial chain a row."""
    x = s
    for _ in gl.static_range(4):
        a, b = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute([0, 2, 1]).split()
        x = gl.maximum(a, b)
    return gl.convert_layout(gl.max(x, 1), ROW)


@gluon.jit
def _finite(peak):
    """What is taken off a row's logits: their maximum, or 0 where all of them are minus infinity."""
    return gl.where(peak == _NONE, 0.0, peak)


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


def _rescale_code(n: int) -> tuple[str, str]:
    """PTX that multiplies n registers of a thread by the fade of their rows, unless all rows of the warp have 1.

    Registers of an accumulator alternate between a thread's two rows in pairs: operands 2n and 2n+2 are the fades.
    """
    multiply = "\n".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    test = f"setp.neu.f32 p, ${2 * n}, 0f3F800000;\nsetp.neu.or.f32 p, ${2 * n + 2}, 0f3F800000, p;"
    code = f"{{\n.reg .pred p, q;\n{test}\nvote.sync.any.pred q, p, 0xffffffff;\n@!q bra SAME;\n{multiply}\nSAME:\n}}"
    return code, ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


_CODE_64, _OPERANDS_64 = map(gl.constexpr, _rescale_code(64))
_CODE_32, _OPERANDS_32 = map(gl.constexpr, _rescale_code(32))


@gluon.jit
def _rescaled(acc, fade, DIM: gl.constexpr):
    """acc times fade, row by row; a warp whose rows keep their maximum steps over it."""
    fades = gl.expand_dims(fade, 1)
    if DIM == 128:
        return gl.inline_asm_elementwise(_CODE_64, _OPERANDS_64, [acc, fades], gl.float32, is_pure=True, pack=64)
    return gl.inline_asm_elementwise(_CODE_32, _OPERANDS_32, [acc, fades], gl.float32, is_pure=True, pack=32)


@gluon.jit
def _write(acc, mass, peak, outs, tile, sizes, HALF: gl.constexpr, DIM: gl.constexpr, HIDES: gl.constexpr):
    """Output, and log-sum-exp where it is wanted, to the caller's tokens."""
    S_ROW: gl.constexpr = gl.SliceLayout(1, _accumulator(128))
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    out, lse, out_order, lengths, out_b, out_h, out_n = outs
    bh = tile.number // sizes.q_blocks
    first = (tile.number % sizes.q_blocks) * 128 + HALF * 64
    empty = mass == 0.0
    share = gl.convert_layout(gl.where(empty, 0.0, 1.0 / mass), gl.SliceLayout(1, _accumulator(DIM)))
    result = (acc * gl.expand_dims(share, 1)).to(out.dtype.element_ty)
    position, token, there = _tokens_of_rows(out_order, first, sizes, gl.SliceLayout(1, WIDE))
    head = out + (bh // sizes.heads).to(gl.int64) * out_b + (bh % sizes.heads).to(gl.int64) * out_h
    column = gl.arange(0, DIM, gl.SliceLayout(0, WIDE))
    at = gl.expand_dims(token.to(gl.int64) * out_n, 1) + gl.expand_dims(column, 0)
    result = gl.convert_layout(result, WIDE)
    end = sizes.q_len
    if lengths is not None:  # queries beyond it attend to nothing
        end = _end(lengths, bh // sizes.heads, sizes.kv_len)
        result = gl.where(gl.expand_dims(position < end, 1), result, 0.0)
    gl.store(head + at, result, mask=gl.expand_dims(there, 1))
    if lse is not None:
        position, token, there = _tokens_of_rows(out_order, first, sizes, S_ROW)
        if not HIDES:
            empty = empty | (tile.ragged >= 0)
        if lengths is not None:
            empty = empty | (position >= end)
        natural = gl.where(empty, _NONE, (_finite(peak) + gl.log2(mass)) * _LN_2)
        gl.store(lse + bh.to(gl.int64) * sizes.q_len + token, natural, mask=there)


@gluon.jit
def _tokens_of_rows(out_order, first, sizes, LAYOUT: gl.constexpr):
    """The positions and the caller's tokens of a consumer's 64 rows, and which of them there are."""
    position = first + gl.arange(0, 64, LAYOUT)
    there = position < sizes.q_len
    token = position
    if out_order is not None:
        token = gl.load(out_order + position, mask=there, other=0)
    return position, token, there
