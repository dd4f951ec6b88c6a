"""The producer: it takes tiles, walks their lists, and has the copy engine fill the rings."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from rainfusion.backends.triton.hopper.stream import fetch, valid_keys, wait_free

_BEYOND = gl.constexpr(2**30)  # no row of anything: the copy engine reads zeros there


class Taken(NamedTuple):
    """A tile as it came off the counter.

    Attributes:
        place: which one it is, beyond the last tile once all are taken.
        number: the tile; beyond the last one it is the last one again, whose first block and queries are fetched and
            not used: the consumers look one step ahead, and this gives them something to see.
        count: the blocks it keeps; begin: where in their list its walk begins; block: the one there.
        valid: the keys of the last listed block that take part, more than 128 where all do and 0 where it keeps none.
        q_scale: the scale of its queries, where they have one.
    """

    place: gl.tensor
    number: gl.tensor
    count: gl.tensor
    begin: gl.tensor
    block: gl.tensor
    valid: gl.tensor
    q_scale: gl.tensor


@gluon.jit
def produce(sources, rings, lists, sizes, STAGES: gl.constexpr, MEANS: gl.constexpr, HIDES, EMPTIES, ON_QUERIES):
    """Fill the rings, tile after tile.

    The next tile is taken as soon as the rings are full of the current one, so that what that waits for is hidden.

    Args:
        sources: descriptors of q, k, v, of the means of k and v and of their bias; the scales of queries, and
            descriptors of those of keys and of means. None where the call has none of a kind.
    """
    q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc, bias_desc, q_scales, k_scale_desc, mean_scale_desc = sources
    it = 0
    t = 0
    taken = _take_tile(lists, q_scales, sizes, EMPTIES, ON_QUERIES)
    going = True
    while going:
        going = taken.place < sizes.tiles
        tile = taken.number
        bh = tile // sizes.q_blocks
        b, h = bh // sizes.heads, bh % sizes.heads
        head = (b, h // sizes.group)
        kv_head = b * (sizes.heads // sizes.group) + h // sizes.group
        listed = lists.indices + tile.to(gl.int64) * lists.index_stride
        kept = gl.maximum(taken.count, 1)  # a tile that keeps nothing takes a step over nothing
        steps = kept + sizes.mean_steps
        _tell(rings.mail, t, gl.where(going, tile, -1), taken, sizes, q_scales is not None, HIDES)
        _fill_keys(rings, it, k_desc, head, taken.block, k_scale_desc, kv_head, sizes.kv_blocks, STAGES)
        wait_free(rings.q, t, 2)
        mbarrier.expect(rings.q.full.index(t % 2), 2 * q_desc.block_type.nbytes)
        first_row = (tile % sizes.q_blocks) * 128
        if EMPTIES and not MEANS:  # queries that attend to nothing are read as zeros too: NaN times 0 would be NaN
            first_row = gl.where(taken.count > 0, first_row, sizes.q_blocks * 128)
        for half in gl.static_range(2):
            row = first_row + half * 64
            fetch(q_desc, [b, h, row, 0], rings.q.full.index(t % 2), rings.q.data.index((t % 2) * 2 + half))
        if going:
            last, first, block = kept - 1, taken.begin, taken.block
            for j in range(1, steps + 1):
                at = first + gl.minimum(j, last)
                following = gl.load(listed + gl.where(at > last, at - last - 1, at))
                mean = j - 1 - last  # which run of 128 means step j takes, if these have begun
                if j < steps:
                    if MEANS and mean >= 0:
                        _fill_means(
                            rings,
                            it + 1,
                            mean_k_desc,
                            head,
                            mean,
                            bias_desc,
                            tile,
                            mean_scale_desc,
                            kv_head,
                            sizes.mean_steps,
                            STAGES,
                        )
                    else:
                        _fill_keys(
                            rings, it + 1, k_desc, head, following, k_scale_desc, kv_head, sizes.kv_blocks, STAGES
                        )
                if MEANS and mean > 0:
                    _fill(rings.v, it, mean_v_desc, head, mean - 1, STAGES)
                else:
                    _fill(rings.v, it, v_desc, head, block, STAGES)
                if j == gl.minimum(steps, STAGES):
                    taken = _take_tile(lists, q_scales, sizes, EMPTIES, ON_QUERIES)
                block = following
                it += 1
            t += 1


@gluon.jit
def _take_tile(lists, q_scales, sizes, EMPTIES: gl.constexpr, ON_QUERIES: gl.constexpr):
    """The next tile off the counter."""
    place = gl.atomic_add(lists.counter, 1, sem="relaxed")
    tile = gl.load(lists.tiles + gl.minimum(place, sizes.tiles - 1))
    count = gl.load(lists.counts + tile * lists.count_stride)
    q_scale = place.to(gl.float32)
    if q_scales is not None:
        q_scale = gl.load(q_scales + tile)
    end = sizes.kv_len
    if lists.lengths is not None:  # lists hold no block without a valid key, except for the one that all rows share
        end = valid_keys(lists.lengths, tile // sizes.q_blocks // sizes.heads, sizes.kv_len)
        count = gl.minimum(count, (end + 127) // 128)
        if ON_QUERIES:
            count = gl.where(tile % sizes.q_blocks * 128 < end, count, 0)
    begin = count * (place % sizes.phases) // sizes.phases
    listed = lists.indices + tile.to(gl.int64) * lists.index_stride
    block = gl.load(listed + begin)
    valid = gl.where(count > 0, end - gl.load(listed + gl.maximum(count - 1, 0)) * 128, 0)
    if EMPTIES:
        block = gl.where(count > 0, block, sizes.kv_blocks)
    return Taken(place, tile, count, begin, block, valid, q_scale)


@gluon.jit
def _tell(mail, t, number, taken, sizes, SCALED: gl.constexpr, HIDES: gl.constexpr):
    """Let the consumers know of the t-th tile; -1 is the number beyond the last."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    kept = gl.maximum(taken.count, 1)
    ragged = gl.where(taken.valid < 128, kept - 1 - taken.begin, -1)
    wait_free(mail, t, 2)
    mail.tile.index(t % 2).store(gl.full([1], number, gl.int32, one))
    mail.kept.index(t % 2).store(gl.full([1], kept, gl.int32, one))
    mail.ragged.index(t % 2).store(gl.full([1], ragged, gl.int32, one))
    if HIDES:
        mail.valid.index(t % 2).store(gl.full([1], taken.valid, gl.int32, one))
    if SCALED:  # that of queries which attend to nothing does not matter, and may be NaN
        q_scale = gl.where(taken.count + sizes.mean_steps > 0, taken.q_scale, 1.0)
        mail.q_scale.index(t % 2).store(gl.full([1], q_scale, gl.float32, one))
    mbarrier.arrive(mail.full.index(t % 2), count=1)


@gluon.jit
def _fill(ring, it, desc, head, block, STAGES: gl.constexpr):
    """Fetch a block of a head into the slot of step `it`."""
    wait_free(ring, it, STAGES)
    full = ring.full.index(it % STAGES)
    mbarrier.expect(full, desc.block_type.nbytes)
    fetch(desc, [head[0], head[1], block * desc.block_shape[2], 0], full, ring.data.index(it % STAGES))


@gluon.jit
def _fill_keys(rings, it, desc, head, block, scale_desc, kv_head, blocks, STAGES: gl.constexpr):
    """Fetch a block of keys, and their scale where they have one; both are zeros for a block beyond the end."""
    wait_free(rings.k, it, STAGES)
    full = rings.k.full.index(it % STAGES)
    if scale_desc is None:
        mbarrier.expect(full, desc.block_type.nbytes)
    else:
        mbarrier.expect(full, desc.block_type.nbytes + scale_desc.block_type.nbytes)
        row = gl.where(block < blocks, kv_head * blocks + block, _BEYOND)
        fetch(scale_desc, [row, 0], full, rings.k_scale.index(it % (2 * STAGES)))
    fetch(desc, [head[0], head[1], block * 128, 0], full, rings.k.data.index(it % STAGES))


@gluon.jit
def _fill_means(rings, it, desc, head, run, bias_desc, tile, scale_desc, kv_head, runs, STAGES: gl.constexpr):
    """Fetch 128 means of a head, what is added to their logits, and their scale where they have one."""
    wait_free(rings.k, it, STAGES)
    full = rings.k.full.index(it % STAGES)
    if scale_desc is None:
        mbarrier.expect(full, desc.block_type.nbytes + bias_desc.block_type.nbytes)
    else:
        mbarrier.expect(full, desc.block_type.nbytes + bias_desc.block_type.nbytes + scale_desc.block_type.nbytes)
        fetch(scale_desc, [kv_head * runs + run, 0], full, rings.k_scale.index(it % (2 * STAGES)))
    fetch(desc, [head[0], head[1], run * 128, 0], full, rings.k.data.index(it % STAGES))
    fetch(bias_desc, [tile, run * 128], full, rings.bias.index(it % STAGES))
