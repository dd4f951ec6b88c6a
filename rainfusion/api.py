"""The face: attention in one call, the same in three, and who runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from rainfusion.core import lower as lowering
from rainfusion.core import select
from rainfusion.core.backend import Backend, BackendSpec, Device
from rainfusion.core.errors import ProblemError, SpeedWarning, warn_caller
from rainfusion.core.ir import Plan
from rainfusion.core.layout import TokenLayout
from rainfusion.core.lower import Executable
from rainfusion.core.mask import BlockMask
from rainfusion.core.planner import plan
from rainfusion.core.policy import Fixed, Policy, TopK
from rainfusion.core.problem import AttentionProblem
from rainfusion.core.select import Choice
from rainfusion.plugins.manager import host

Array = Any
ENVIRONMENT = "RAINFUSION_BACKEND"
_in_use: ContextVar[str | None] = ContextVar("rainfusion_backend", default=None)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    grid: tuple[int, int, int] | None = None,
    text: int = 0,
    text_position: str = "end",
    sparsity: float | None = None,
    policy: Policy | None = None,
    block: int | tuple[int, int] = 128,
    window: tuple[int, int, int] | None = None,
    sink: str | None = "first_frame",
    omitted: str = "drop",
    tensor_layout: str = "bhsd",
    scale: float | None = None,
    mask: BlockMask | None = None,
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
        sparsity: share of block pairs to skip, in [0, 1); default 0.8; 0 is dense attention.
        policy: `TopK`, `TopP` or `Fixed`, instead of `sparsity`.
        block: tokens a block, or (query, key).
        window: (t, h, w) tokens folded into blocks; default: the most compact that fills one.
        sink: ``"first_frame"`` keeps the first frame dense; None does not.
        omitted: ``"drop"``, or ``"summary"``: skipped blocks still count through their means.
        tensor_layout: ``"bhsd"`` or ``"bshd"``.
        scale: factor on the logits; default ``head_dim ** -0.5``.
        mask: a `BlockMask` to use instead of selecting one; excludes `sparsity` and `policy`. Its blocks are in
            the order of grid, text, window and sink: give those it was made with.
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
        SparsityWarning: the sparsity cannot be reached; the message names the one that is.
        SpeedWarning: once for each plan, where dense attention is estimated to be faster.

    NaN: a block whose score is NaN is selected last; NaN inside attended tokens spreads as in dense
    attention.
    """
    settings: dict[str, Any] = {
        "grid": grid,
        "text": text,
        "text_position": text_position,
        "sparsity": sparsity,
        "policy": policy,
        "block": block,
        "window": window,
        "sink": sink,
        "omitted": omitted,
        "tensor_layout": tensor_layout,
        "scale": scale,
        "mask": mask,
        "return_lse": return_lse,
        "return_mask": return_mask,
        "backend": backend,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        from rainfusion import traced

        return traced.attention(q, k, v, **settings)
    return attention_now(q, k, v, **settings)


def attention_now(
    q: Array,
    k: Array,
    v: Array,
    *,
    grid: tuple[int, int, int] | None,
    text: int,
    text_position: str,
    sparsity: float | None,
    policy: Policy | None,
    block: int | tuple[int, int],
    window: tuple[int, int, int] | None,
    sink: str | None,
    omitted: str,
    tensor_layout: str,
    scale: float | None,
    mask: BlockMask | None,
    return_lse: bool,
    backend: str | None,
    return_mask: bool = False,
) -> Any:
    """`attention`, made here and now, whoever may be recording calls."""
    problem = AttentionProblem.from_tensors(q, k, v, scale=scale, tensor_layout=tensor_layout)
    layout = TokenLayout(grid, text, text_position, window, block, sink)  # type: ignore[arg-type]
    returns = ("%out", *(("%lse",) if return_lse else ()), *(("%mask",) if return_mask else ()))
    made = plan(problem, layout, _policy(sparsity, policy, mask), omitted=omitted, returns=returns)
    return _executable(made, q, backend).run(q, k, v, mask)


def lower(plan: Plan, *, device: object = None, backend: str | None = None, strict: bool = False) -> Executable:
    """Lower a plan, to be called as ``run(q, k, v)`` many times.

    Args:
        device: address such as ``"cuda:0"`` or ``"cpu"``, as `devices` lists them, or what prints as one: a
            `Device`, a `torch.device`; default: the best.
        backend: its name; default as in `attention`.
        strict: forbid operations that no kernel of the backend takes.

    Raises:
        BackendError: no backend for this plan and device, or, under `strict`, a gap.
    """
    taken = _choose(plan, backend, device=device).candidate
    return _lower(taken.backend, taken.device, plan, strict)


def choose(plan: Plan, *, like: Array = None, device: object = None, backend: str | None = None) -> Choice:
    """Which backend would run `plan` where the array `like` lives (or on `device`), why, and which are out.

    Raises:
        BackendError: none would.
    """
    return _choose(plan, backend, array=like, device=device)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run everything inside the ``with`` block on one backend; nests, and is local to thread and task.

    Raises:
        UnknownBackendError: nobody announced that name.
    """
    host().announced(backend)
    token = _in_use.set(backend)
    try:
        yield
    finally:
        _in_use.reset(token)


def register(spec: BackendSpec) -> None:
    """Announce a backend in this process; packages announce theirs by entry point instead.

    Raises:
        DuplicateBackendError: the name is taken.
    """
    host().register(spec)


def unregister(name: str) -> None:
    """Take back a backend announced by `register`.

    Raises:
        UnknownBackendError: it was not.
    """
    host().unregister(name)
    _lower.cache_clear()
    _choices.clear()


_choices: dict[tuple[Any, ...], Choice] = {}
_MOST_CACHED = 64  # an executable holds its token order on the device


def _executable(made: Plan, q: Array, backend: str | None) -> Executable:
    """The executable for a plan and the place where q lives; the backend is chosen once for each."""
    key = (made, _asked(backend), type(q), str(getattr(q, "device", None)), host().names)
    choice = _choices.get(key)
    if choice is None:
        if len(_choices) >= _MOST_CACHED:
            _choices.clear()
        choice = _choices[key] = _choose(made, backend, array=q)
    _warn_where_skipping_does_not_pay(made, str(choice.candidate), choice.candidate.speedup)
    return _lower(choice.candidate.backend, choice.candidate.device, made, False)


@lru_cache(maxsize=4096)  # so each plan warns once
def _warn_where_skipping_does_not_pay(made: Plan, taken: str, speedup: float | None) -> None:
    if speedup is not None and speedup < 1:
        warn_caller(
            f"skipping blocks does not pay here: {taken} is estimated to take {1 / speedup:.1f} times as long as dense "
            f"attention over {made.problem.q_len} x {made.problem.kv_len} tokens; give sparsity=0 for that",
            SpeedWarning,
        )


@lru_cache(maxsize=_MOST_CACHED)
def _lower(backend: Backend, device: Device, made: Plan, strict: bool) -> Executable:
    return lowering.lower(made, backend, device, strict=strict)


def _choose(made: Plan, backend: str | None, array: Array = None, device: object = None) -> Choice:
    asked, words = _asked(backend) or (None, None)
    loaded, missing = ([host().backend(asked)], []) if asked else host().backends()
    address = None if device is None else str(device)
    able, rejected = select.candidates(made, loaded, array=array, device=address)
    return select.choose(made, able, [*missing, *rejected], words, host().override)


def _asked(backend: str | None) -> tuple[str, str] | None:
    """The backend asked for, and by what: the argument, `use`, the environment; None leaves the choice to us."""
    within, environment = _in_use.get(), os.environ.get(ENVIRONMENT)
    if backend is not None:
        return host().announced(backend).spec.name, f"backend={backend!r}"
    if within:
        return within, f"rainfusion.use({within!r})"
    return (environment, f"{ENVIRONMENT}={environment}") if environment else None


def _policy(sparsity: float | None, policy: Policy | None, mask: BlockMask | None) -> Policy:
    """The one policy that the arguments name."""
    given = {"sparsity": sparsity, "policy": policy, "mask": mask}
    named = [name for name, value in given.items() if value is not None]
    if mask is not None and isinstance(policy, Fixed):
        named.remove("policy")
    if len(named) > 1:
        raise ProblemError(f"{' and '.join(named)} both say what to attend; give one of them")
    if mask is not None:
        return Fixed()
    if policy is not None:
        return policy
    return TopK() if sparsity is None else TopK(sparsity)
