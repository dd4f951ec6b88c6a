"""The public functions: attention in one call, its pieces, and a plan lowered to be called many times."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from rainfusion import dispatch
from rainfusion.calls import Settings, call, settings_of
from rainfusion.core import executable as executables
from rainfusion.core import ops
from rainfusion.core.arrays import cannot, dtype_name, library_name, namespace, shape_of
from rainfusion.core.checks import as_flag, one_of, shown
from rainfusion.core.errors import LayoutError, ProblemError, RainfusionError
from rainfusion.core.executable import Executable, swap_if_bshd
from rainfusion.core.mask import BlockMask
from rainfusion.core.ops.means import compute_dtype
from rainfusion.core.plan import Plan
from rainfusion.core.policies import Policy
from rainfusion.core.problem import DTYPES, TENSOR_LAYOUTS

Array = Any


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    grid: tuple[int, int, int] | None = None,
    text: int = 0,
    text_position: str = "end",
    parts: Iterable[Any] | None = None,
    sparsity: float | tuple[float, ...] | None = None,
    policy: Policy | None = None,
    block: int | tuple[int, int] = 128,
    window: tuple[int, int, int] | None = None,
    sink: str | tuple[str, ...] | None = "first_frame",
    omitted: str = "drop",
    order: str = "window",
    tensor_layout: str = "bhsd",
    scale: float | None = None,
    precision: str | None = None,
    rotate: bool = False,
    mask: BlockMask | None = None,
    quotas: Array = None,
    kv_lengths: Array = None,
    return_lse: bool = False,
    return_mask: bool = False,
    backend: str | None = None,
) -> Any:
    """Block-sparse attention, `softmax(q kᵀ · scale) v` over the blocks that matter (arXiv 2512.24086).

    Args:
        q: ``[batch, heads, q_len, head_dim]``, or ``[batch, q_len, heads, head_dim]`` for `bshd`.
        k, v: the same with their own head count (which divides that of q) and length.
        grid: (frames, height, width) of the video tokens; None for a sequence without one.
        text: text tokens in the same sequence, before (``text_position="start"``) or after the video.
        parts: the sequence as `Grid`, `Text` and `Tokens` parts, instead of grid and text.
        sparsity: share of block pairs to skip, in [0, 1), or one share a head; default 0.8; 0 is dense attention.
        policy: `TopK`, `TopP`, `Hybrid`, `Fixed` or one of your own, instead of `sparsity`.
        block: tokens a block, or (query, key).
        window: (t, h, w) tokens folded into blocks; default: the most compact that fills one.
        sink: ``"first_frame"`` keeps the first frame's rows and columns dense, ``"first_frame_keys"`` its columns
            only; ``"last_frame"`` and ``"last_frame_keys"`` likewise; a tuple of them; None for none.
        omitted: ``"drop"``, or ``"summary"``: skipped blocks still count through their means.
        order: ``"window"``, or ``"given"`` where tokens already stand in block order (`TokenLayout.to_blocks`).
        tensor_layout: ``"bhsd"`` or ``"bshd"``.
        scale: factor on the logits; default ``head_dim ** -0.5``.
        precision: ``"int8"`` (INT8 queries and keys, FP8 values and softmax weights) or ``"fp8"`` (all FP8); None
            attends in the tensors' own dtype. A backend without such kernels computes the same rounding, no faster.
        rotate: with a precision, a Hadamard transform of queries and keys before they are rounded: for channels far
            larger than the others. head_dim must be a power of two.
        mask: a `BlockMask` to use instead of selecting one; excludes `sparsity` and `policy`. Its blocks are in
            the order of grid, text, window and sink: give those it was made with.
        quotas: unprotected key blocks that every unprotected query block keeps, int ``[heads or 1, rows]``
            (`Plan.quotas`), instead of a share; changing them costs nothing.
        kv_lengths: valid tokens of every sample in block order, int ``[batch]``: the padded end of the text takes no
            part, and padded queries give 0.
        return_lse: also return the log-sum-exp, float32 ``[batch, heads, q_len]``.
        return_mask: also return the `BlockMask` that was used.
        backend: its name; default: `use`, then ``RAINFUSION_BACKEND``, then the best for the device.

    Returns:
        The output, like q in kind, dtype, device and shape; with `return_lse` or `return_mask` a tuple
        ``(out, lse, mask)`` of what was asked for.

    Raises:
        ProblemError, LayoutError, PolicyError, MaskError: an argument that does not fit.
        BackendError: the backend is unknown, unavailable, or cannot run this.

    Warns:
        SparsityWarning: the sparsity cannot be reached, or protection takes most of what is kept.
        SpeedWarning: where dense attention is estimated to be faster, or a precision is computed by its definition.

    NaN: a block whose score is NaN is selected last; NaN inside attended tokens spreads as in dense
    attention.
    """
    settings = Settings(
        grid,
        text,
        text_position,
        parts if parts is None or isinstance(parts, tuple) else _as_tuple(parts),
        sparsity,
        policy,
        block,
        window,
        sink,
        omitted,
        order,
        tensor_layout,
        scale,
        precision,
        rotate,
    )
    returns = _returned(return_lse, return_mask)
    arguments = {"q": q, "k": k, "v": v, "mask": mask, "quotas": quotas, "kv_lengths": kv_lengths}
    return _call(arguments, settings, returns, backend)


def select(
    q: Array, k: Array, *, quotas: Array = None, kv_lengths: Array = None, backend: str | None = None, **settings: Any
) -> BlockMask:
    """The blocks that `attention` would attend to, without attending.

    Args:
        q, k: as in `attention`.
        quotas, kv_lengths, backend, settings: the arguments of `attention` by the same names. `omitted` and `precision`
            change nothing about what is selected.

    Raises:
        ProblemError: an argument that `attention` does not have, and as `attention`.
    """
    arguments = {"q": q, "k": k, "v": None, "mask": None, "quotas": quotas, "kv_lengths": kv_lengths}
    mask: BlockMask = _call(arguments, settings_of(settings), ("%mask",), backend)
    return mask


def block_means(
    x: Array, *, side: str = "kv", kv_lengths: Array = None, backend: str | None = None, **settings: Any
) -> Array:
    """Means of the blocks of a tensor, as selection and summaries read them.

    Args:
        x: ``[batch, heads, tokens, head_dim]``, or ``[batch, tokens, heads, head_dim]`` for `bshd`.
        side: ``"q"`` or ``"kv"``: whose block size to take.
        kv_lengths, backend, settings: the arguments of `attention` by the same names.

    Returns:
        float32 (float64 for float64) ``[batch, heads, blocks, head_dim]``, in the kind and on the device of `x`.

    Raises:
        ProblemError: another side, an argument that `attention` does not have, and as `attention`.
    """
    one_of(side, ("q", "kv"), "side", ProblemError)
    arguments = {"q": x, "k": x, "v": None, "mask": None, "quotas": None, "kv_lengths": kv_lengths}
    return _call(arguments, settings_of(settings), ("%qb",) if side == "q" else ("%kb",), backend)


def merge(
    out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, *, tensor_layout: str = "bhsd"
) -> tuple[Array, Array]:
    """Two attentions over disjoint keys as the one over their union, by log-sum-exp.

    Args:
        out_a, out_b: outputs as `attention` returns them, in `tensor_layout`.
        lse_a, lse_b: their log-sum-exp, ``[batch, heads, q_len]``; minus infinity where a row attended to nothing.

    Returns:
        ``(out, lse)``: the output in the dtype of `out_a`, computed in float32 or wider.

    Raises:
        ProblemError: shapes that do not belong together, or arrays whose library does not compute this with them.
    """
    one_of(tensor_layout, TENSOR_LAYOUTS, "tensor_layout", ProblemError)
    arrays = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    xp = _namespace_of(arrays)
    try:
        return _merged(xp, out_a, lse_a, out_b, lse_b, tensor_layout)
    except (NotImplementedError, TypeError, RuntimeError) as error:
        if isinstance(error, RainfusionError) or type(error).__name__ == "OutOfMemoryError":
            raise
        raise ProblemError(cannot(arrays, "be merged", error)) from error


def _merged(xp: Any, out_a: Array, lse_a: Array, out_b: Array, lse_b: Array, tensor_layout: str) -> tuple[Array, Array]:
    """What `merge` returns, in the namespace of its arrays."""
    outs = [swap_if_bshd(xp.astype(out, compute_dtype(out, xp), copy=False), tensor_layout) for out in (out_a, out_b)]
    shapes = [tuple(out_a.shape), tuple(lse_a.shape), tuple(out_b.shape), tuple(lse_b.shape)]
    if outs[0].ndim != 4 or not shapes[0] == shapes[2] or not shapes[1] == shapes[3] == tuple(outs[0].shape[:3]):
        raise ProblemError(f"out and lse of two attentions have shapes {shapes}; give two of one problem")
    out, lse = ops.merge(outs[0], lse_a, outs[1], lse_b)
    return xp.astype(swap_if_bshd(out, tensor_layout), out_a.dtype, copy=False), lse


def _namespace_of(arrays: Mapping[str, Any]) -> Any:
    """The namespace of floating-point arrays of one library."""
    for name, x in arrays.items():
        if dtype_name(x) not in DTYPES or shape_of(x) is None:
            given = "no array" if dtype_name(x) == "None" else f"of dtype {dtype_name(x)}"
            raise ProblemError(f"{name} ({type(x).__name__}) is {given}; give one of {', '.join(DTYPES)}")
    try:
        return namespace(*arrays.values())
    except Exception:
        kinds = ", ".join(f"{name} {library_name(x)}" for name, x in arrays.items())
        raise ProblemError(f"the arrays to merge are of several libraries ({kinds}); give one kind") from None


_RETURNS = MappingProxyType(
    {
        (lse, mask): ("%out", *(("%lse",) if lse else ()), *(("%mask",) if mask else ()))
        for lse in (False, True)
        for mask in (False, True)
    }
)


def _returned(lse: Any, mask: Any) -> tuple[str, ...]:
    return _RETURNS[as_flag(lse, "return_lse", ProblemError), as_flag(mask, "return_mask", ProblemError)]


def _as_tuple(parts: Any) -> tuple[Any, ...]:
    try:
        return tuple(parts)
    except Exception:  # not iterable, or an iterator that fails
        raise LayoutError(f"parts={shown(parts)} is no sequence; give a tuple of Grid, Text and Tokens") from None


def lower(
    plan: Plan, *, like: Array = None, device: object = None, backend: str | None = None, strict: bool = False
) -> Executable:
    """Lower a plan, to be called as ``run(q, k, v)`` many times.

    Args:
        like: an array; the plan is lowered for the device where it lives.
        device: address such as ``"cuda:0"`` or ``"cpu"``, as `devices` lists them, or what prints as one: a
            `Device`, a `torch.device`; default: the best.
        backend: its name; default as in `attention`.
        strict: forbid operations that no kernel of the backend takes.

    Raises:
        BackendError: no backend for this plan and device, or, under `strict`, a gap.
    """
    taken = dispatch.choose(plan, like=like, device=device, backend=backend).candidate
    return dispatch.cache.executable(plan, taken.backend, taken.device, strict=strict)


def _call(arguments: Mapping[str, Any], settings: Settings, returns: tuple[str, ...], backend: str | None) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        from rainfusion import compile as graph

        return graph.record_call(arguments, settings, returns, backend)
    return call(arguments, settings, returns, backend)


def restore(plan: Plan, backend: str, device: str) -> Executable:
    """The executable that was pickled: the plan lowered again for a device of that address."""
    return dispatch.restore(plan, backend, device)


def _torch_tracer() -> executables.Tracer | None:
    torch = sys.modules["torch"]
    if not torch.compiler.is_compiling():
        return None
    from rainfusion import compile as graph

    tracer: executables.Tracer = graph.record
    return tracer


executables.tracers.append(_torch_tracer)
dispatch.cache.restore = restore  # so that what is unpickled knows of the tracer, too
