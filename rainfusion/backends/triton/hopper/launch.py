"""Launching the kernel: descriptors of what the copy engine fetches, sizes, and which forms are compiled."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rainfusion.backends.triton.hopper.consume import consume
from rainfusion.backends.triton.hopper.consume_8bit import consume_8bit
from rainfusion.backends.triton.hopper.produce import produce
from rainfusion.backends.triton.hopper.stream import Lists, Mail, Outs, Ring, Rings, Sizes, barriers
from rainfusion.backends.triton.operands import LOG2_E, Attention, Quantised

_ROWS, _KEYS = 128, 128
_STAGES, _STAGES_8BIT = 2, 4  # slots of the rings of k and v
_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def attend_hopper(given: Attention, out: Tensor, lse: Tensor | None) -> None:
    """Write attention over the listed blocks to `out`, ``[B, H, q_len, D]``, and its log-sum-exp to `lse`.

    Args:
        given: in float16 or bfloat16 (means too) or quantised, head dim 64 or 128, blocks of 128x128, scale above 0;
            q, k and v as `can_fetch` wants them.
        lse: float32 ``[B, H, q_len]`` contiguous, or None.
    """
    if given.quantised is None:
        _launch(given, _sources(given), (out, lse, None, None, None), given.k, _STAGES)
    else:
        x = given.quantised
        _launch(given, _sources_8bit(given, x), (out, lse, x.v_scale, x.v_centre, x.lse_shift), x.k, _STAGES_8BIT)


def can_fetch(x: Tensor) -> bool:
    """Whether the copy engine can read ``[B, H, tokens, D]`` where it lies: addresses in steps of 16 bytes."""
    steps = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in steps)
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and aligned


def _sources(given: Attention) -> tuple[Any, ...]:
    """What the producer fetches, as `produce` lists it."""
    means = given.means
    return (
        _tokens(given.q, given.q_len, _ROWS // 2),
        _tokens(given.k, given.kv_len, _KEYS),
        _tokens(given.v, given.kv_len, _KEYS),
        None if means is None else _tokens(means.k, given.kv_blocks, _KEYS),
        None if means is None else _tokens(means.v, given.kv_blocks, _KEYS),
        None if given.lists.bias is None else _rows(given.lists.bias, _KEYS),
        None,
        None,
        None,
    )


def _sources_8bit(given: Attention, x: Quantised) -> tuple[Any, ...]:
    """The same of 8 bits."""
    means = x.means
    return (
        _tokens(x.q, x.q.shape[2], _ROWS // 2),
        _tokens(x.k, x.k.shape[2], _KEYS),
        _tokens(x.v, x.v.shape[2], x.dim),
        None if means is None else _tokens(means.k, means.k.shape[2], _KEYS),
        None if means is None else _tokens(means.v, means.v.shape[2], x.dim),
        None if given.lists.bias is None else _rows(given.lists.bias, _KEYS),
        x.q_scale,
        _rows(x.k_scale.view(-1, 64), 64),
        None if means is None else _rows(means.k_scale.view(-1, 64), 64),
    )


def _launch(given: Attention, sources: tuple[Any, ...], outs: tuple[Any, ...], k: Tensor, stages: int) -> None:
    out, lse, v_scale, v_centre, lse_shift = outs
    lists, tiles = given.lists, given.tiles.numel()
    heads, dim = out.shape[1], out.shape[3]
    hides = (
        given.kv_len % _KEYS != 0 or given.lengths is not None or (given.may_keep_nothing and sources[3] is not None)
    )
    programs = min(tiles, _properties(out.device).multi_processor_count)
    _attend[(programs,)](
        *sources,
        out,
        lse,
        v_scale,
        v_centre,
        lse_shift,
        given.out_order,
        given.lengths,
        given.tiles,
        torch.zeros(1, dtype=torch.int32, device=out.device),
        lists.counts,
        lists.indices,
        *out.stride()[:3],
        given.q_len,
        given.kv_len,
        tiles,
        heads,
        heads // sources[1].shape[1],
        given.q_blocks,
        given.kv_blocks,
        0 if sources[3] is None else -(-given.kv_blocks // _KEYS),
        programs if _outgrows_cache(k, given.kv_len) else 1,
        *lists.strides,
        given.scale * LOG2_E,
        DIM=dim,
        STAGES=stages,
        HIDES=hides,
        EMPTIES=given.may_keep_nothing or given.lengths is not None,
        LENGTHS_ON_QUERIES=given.lengths is not None and given.lengths_on_queries,
        IS_8BIT=given.quantised is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _tokens(x: Tensor, length: int, rows: int) -> TensorDescriptor:
    """Runs of `rows` tokens of one head; what lies beyond `length` tokens is read as zero."""
    batch, heads, _, dim = x.shape
    strides = [stride if size > 1 else 8 * dim for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(
        x, [batch, heads, length, dim], [*strides, 1], [1, 1, rows, dim], _layout(rows, dim, x.dtype)
    )


@lru_cache
def _layout(rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], _DTYPES[dtype])


def _rows(x: Tensor, columns: int) -> TensorDescriptor:
    """Runs of `columns` float32 of one row."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, columns], gl.NVMMASharedLayout(0, 32, 2))


def _outgrows_cache(k: Tensor, kv_len: int) -> bool:
    """Whether keys and values of one head are more than half of the second-level cache, the part near a program."""
    return 2 * kv_len * k.shape[3] * k.element_size() > int(_properties(k.device).L2_cache_size) // 2


@lru_cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


@gluon.jit
def _attend(
    q_desc,
    k_desc,
    v_desc,
    mean_k_desc,
    mean_v_desc,
    bias_desc,
    q_scales,
    k_scale_desc,
    mean_scale_desc,
    out,
    lse,
    v_scale,
    v_centre,
    lse_shift,
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
    IS_8BIT: gl.constexpr,
):
    number: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows: gl.constexpr = gl.NVMMASharedLayout(0, 32, 2)
    V_ROWS: gl.constexpr = DIM if IS_8BIT else 128
    V_COLUMNS: gl.constexpr = 128 if IS_8BIT else DIM
    q_full, q_free = barriers(2, 2)
    k_full, k_free = barriers(STAGES, 2)
    v_full, v_free = barriers(STAGES, 2)
    mail_full, mail_free = barriers(2, 2)
    q_ring = Ring(gl.allocate_shared_memory(q_desc.dtype, [4, 1, 1, 64, DIM], q_desc.layout), q_full, q_free)
    k_ring = Ring(gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 128, DIM], k_desc.layout), k_full, k_free)
    v_shape: gl.constexpr = [STAGES, 1, 1, V_ROWS, V_COLUMNS]
    v_ring = Ring(gl.allocate_shared_memory(v_desc.dtype, v_shape, v_desc.layout), v_full, v_free)
    mail = Mail(
        gl.allocate_shared_memory(gl.int32, [2, 1], number),
        gl.allocate_shared_memory(gl.int32, [2, 1], number),
        gl.allocate_shared_memory(gl.int32, [2, 1], number),
        gl.allocate_shared_memory(gl.int32, [2, 1], number),
        gl.allocate_shared_memory(gl.float32, [2, 1], number),
        mail_full,
        mail_free,
    )
    MEANS: gl.constexpr = bias_desc is not None
    bias = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], rows)
    k_scale = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, 64], rows)
    hidden = gl.allocate_shared_memory(gl.float32, [2, 128], number)
    rings = Rings(q_ring, k_ring, v_ring, bias, k_scale, hidden, mail)
    lists = Lists(tiles, counter, counts, indices, lengths, count_stride, index_stride)
    sizes = Sizes(q_len, kv_len, tile_count, heads, group, q_blocks, kv_blocks, mean_steps, phases, scale)
    q_lengths = lengths if LENGTHS_ON_QUERIES else None
    outs = Outs(out, lse, out_order, q_lengths, out_b, out_h, out_n, v_scale, v_centre, lse_shift)
    sources = (
        q_desc,
        k_desc,
        v_desc,
        mean_k_desc,
        mean_v_desc,
        bias_desc,
        q_scales,
        k_scale_desc,
        mean_scale_desc,
    )
    if IS_8BIT:
        gl.warp_specialize(
            [
                (consume_8bit, (outs, rings, sizes, 0, DIM, STAGES, HIDES, MEANS)),
                (consume_8bit, (outs, rings, sizes, 1, DIM, STAGES, HIDES, MEANS)),
                (produce, (sources, rings, lists, sizes, STAGES, MEANS, HIDES, EMPTIES, LENGTHS_ON_QUERIES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (outs, rings, sizes, 0, DIM, STAGES, HIDES, MEANS)),
                (consume, (outs, rings, sizes, 1, DIM, STAGES, HIDES, MEANS)),
                (produce, (sources, rings, lists, sizes, STAGES, MEANS, HIDES, EMPTIES, LENGTHS_ON_QUERIES)),
            ],
            [4, 1],
            [240, 24],
        )
