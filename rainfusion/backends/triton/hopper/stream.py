"""What the producer and the consumers of a program share: rings of shared memory, and news of tiles."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.7 renamed it
sync_warps = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed as well


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
    """Two slots in which the producer tells the consumers of a tile, as in `Tile`, how many keys of the ragged step
    count, and the scale of its queries where they have one.
    """

    tile: gl.shared_memory_descriptor
    kept: gl.shared_memory_descriptor
    ragged: gl.shared_memory_descriptor
    valid: gl.shared_memory_descriptor
    q_scale: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


class Rings(NamedTuple):
    """All that passes between the producer and a consumer.

    Beside a slot of k lies what is added to its logits (`bias`, where it holds means). `k_scale` holds the scales of
    8-bit keys, 64 times each, in twice as many slots: a warp may still read one when another has let go of the keys,
    but is not a step behind, for products bring all four together. `hidden` is a consumer's own: what it adds to hide
    keys.
    """

    q: Ring
    k: Ring
    v: Ring
    bias: gl.shared_memory_descriptor
    k_scale: gl.shared_memory_descriptor
    hidden: gl.shared_memory_descriptor
    mail: Mail


class Outs(NamedTuple):
    """Where results go: the output and its strides, the log-sum-exp, the order of the caller's tokens, and the lengths
    where queries have some. For 8 bits also what turns accumulated values into the caller's (`v_scale`, `v_centre`,
    ``[B, H of v, D]``), and what centred keys lack in the log-sum-exp (``[B, H, q blocks * 128]``).
    """

    out: gl.tensor
    lse: gl.tensor
    order: gl.tensor
    lengths: gl.tensor
    stride_b: gl.tensor
    stride_h: gl.tensor
    stride_n: gl.tensor
    v_scale: gl.tensor
    v_centre: gl.tensor
    lse_shift: gl.tensor


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
def barriers(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Barriers of `SLOTS` slots; a slot is free again when all its readers have said so."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=READERS)
    return full, free


@gluon.jit
def wait_full(ring, it, SLOTS: gl.constexpr, pred=True):
    """Wait until the slot of step `it` is filled."""
    mbarrier.wait(ring.full.index(it % SLOTS), (it // SLOTS) & 1, pred=pred)


@gluon.jit
def wait_free(ring, it, SLOTS: gl.constexpr):
    """Wait until the slot of step `it` may be filled."""
    mbarrier.wait(ring.free.index(it % SLOTS), ((it // SLOTS) & 1) ^ 1)


@gluon.jit
def release(ring, it, SLOTS: gl.constexpr):
    """Let the producer fill the slot of step `it` again."""
    mbarrier.arrive(ring.free.index(it % SLOTS), count=1)


@gluon.jit
def valid_keys(lengths, sample, kv_len):
    """The keys of a sample that take part."""
    return gl.maximum(gl.minimum(gl.load(lengths + sample).to(gl.int32), kv_len), 0)
