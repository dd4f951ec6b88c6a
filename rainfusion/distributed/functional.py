"""The public function: attention over a sequence whose tokens are spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from rainfusion import __version__, dispatch
from rainfusion.backends.host_arrays import check_tensors
from rainfusion.calls import Settings, settings_of
from rainfusion.core.checks import as_flag, as_instance, one_of, shown
from rainfusion.core.errors import (
    MaskError,
    PolicyError,
    ProblemError,
    RainfusionWarning,
    SparsityWarning,
    warn_caller,
)
from rainfusion.core.mask import BlockMask
from rainfusion.core.planner import OMITTED, ORDERS
from rainfusion.core.policies import Policy
from rainfusion.core.precision import checked
from rainfusion.core.problem import AttentionProblem
from rainfusion.distributed.agreement import Lengths, agree, raise_together
from rainfusion.distributed.by_tokens import ByTokens
from rainfusion.distributed.call import Call
from rainfusion.distributed.ranks import DistributedError, MeshRanks, Ranks
from rainfusion.distributed.shards import Shards, shards_of
from rainfusion.distributed.ulysses import Ulysses

METHODS = ("ulysses", "gather", "ring", "unified")
_MOST_KINDS = 64  # of calls that are remembered for a process group

Method = Ulysses | ByTokens
_prepared: WeakKeyDictionary[Any, dispatch.LruDict[tuple[Lengths, Method]]] = WeakKeyDictionary()


def clear() -> None:
    """Let go of what was settled for earlier calls; all ranks call it, or none."""
    _prepared.clear()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    method: str = "ulysses",
    balanced: bool = False,
    mask: BlockMask | None = None,
    quotas: Any = None,
    kv_lengths: Any = None,
    return_lse: bool = False,
    return_mask: bool = False,
    backend: str | None = None,
    **settings: Any,
) -> Any:
    """`rainfusion.attention` over a sequence whose tokens are spread over ranks; the result is that of one device.

    Every rank of the group calls it with the same arguments beside its tensors.

    Args:
        q: this rank's query tokens, ``[batch, heads, tokens, head_dim]``, or ``[batch, tokens, heads, head_dim]`` for
            `bshd`. The shards of all ranks, in the order of ranks, are the sequence; they may differ in length.
        k, v: the same for keys and values.
        group: process group or one-dimensional DeviceMesh; default: all ranks. For ``"unified"``, a DeviceMesh of two
            dimensions, ring and Ulysses, whose ranks row by row are those of the sequence.
        method: ``"ulysses"`` spreads heads while it attends, and takes tokens in either `order`; ``"gather"`` gathers
            the keys and values of all ranks; ``"ring"`` passes them around, so that no rank holds all of them;
            ``"unified"`` spreads heads over the ranks of a row of a mesh, and passes keys around between the rows. The
            last three take whole blocks in block order: `shard` makes them, and ``order="given"`` says so. With a
            `precision`, around a ring every rank's keys and values are rounded around their own mean, otherwise as on
            one device.
        balanced: the shards are those of ``shard(x, layout, balanced=True)``.
        mask, quotas, kv_lengths: as in `rainfusion.attention`, of the whole sequence and the same on all ranks.
        return_lse: also return the log-sum-exp of this rank's tokens, float32 ``[batch, heads, tokens]``.
        return_mask: also return the `BlockMask` of the whole sequence.
        backend: as in `rainfusion.attention`.
        settings: the other arguments of `rainfusion.attention`; grid, text, parts and shares a head are those of the
            whole sequence.

    Returns:
        The output of this rank's tokens, like q; with `return_lse` or `return_mask` a tuple ``(out, lse, mask)`` of
        what was asked for.

    Raises:
        DistributedError: no process group; ranks that disagree, and in what; another rank that failed, and why; more
            ranks than heads or blocks.
        ProblemError, LayoutError, PolicyError, MaskError, BackendError: as `rainfusion.attention`.

    Warns:
        SparsityWarning: as `rainfusion.attention`. SpeedWarning: a `precision` is computed by its definition.

    Ranks compare what they were asked before they exchange tensors: at every call on the CPU; elsewhere, where that
    makes the host wait for the device, before each kind of call that is new to this rank. There, where the sequence
    gets another length, `grid` and `text` or `parts` have to say so to a rank that has as many tokens as before.
    """
    ranks = Ranks.of(group)
    operands = {"mask": mask, "quotas": quotas, "kv_lengths": kv_lengths}
    wanted = {"return_lse": return_lse, "return_mask": return_mask}
    values, notes = _attend(ranks, method, balanced, (q, k, v), settings, operands, wanted, backend)
    for note, category in notes:
        warn_caller(note, category)
    return values[0] if len(values) == 1 else tuple(values)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend(
    ranks: Ranks,
    method: str,
    balanced: bool,
    tensors: tuple[Tensor, Tensor, Tensor],
    settings: Mapping[str, Any],
    operands: Mapping[str, Any],
    wanted: Mapping[str, bool],
    backend: str | None,
) -> tuple[list[Any], list[tuple[str, type[RainfusionWarning]]]]:
    """The values of a call, and what its caller is to be warned of."""
    asked: Call | Exception
    record: dict[str, str] = {}
    try:
        _check_method(method, ranks)
        as_flag(balanced, "balanced", ProblemError)
        asked = _asked(ranks, tensors, settings, operands, wanted, backend)
        operands = {**operands, "quotas": None if operands["quotas"] is None else _numbers(operands["quotas"])}
        if balanced and asked.settings.order != "given":
            raise ProblemError("balanced=True is about shards in block order; say order='given', too")
        record = {**_record(method, asked, operands, tensors[0].device.type), "balanced": repr(balanced)}
    except Exception as failure:
        asked = failure
    run = _agreed(ranks, method, balanced, asked, record, tensors[0])
    whole, notes = run.call.whole
    if operands["mask"] is not None and (objection := whole.objection(operands["mask"])):
        raise MaskError(objection)
    warnings: list[tuple[str, type[RainfusionWarning]]] = [(note, SparsityWarning) for note in notes]
    warnings += run.call.notes_of_precision(run.plans[-1], tensors[0])
    with torch.no_grad():
        return run(*tensors, operands), warnings


def _asked(
    ranks: Ranks,
    tensors: tuple[Tensor, Tensor, Tensor],
    settings: Mapping[str, Any],
    operands: Mapping[str, Any],
    wanted: Mapping[str, bool],
    backend: str | None,
) -> Call:
    """The call as this rank sees it: the lengths are its own alone.

    Raises:
        ProblemError, LayoutError, PolicyError, MaskError: an argument that does not fit, whatever the others have.
    """
    for name, x in zip(("q", "k", "v"), tensors, strict=True):
        as_instance(x, Tensor, name, ProblemError)
    check_tensors(*tensors)
    devices = {str(x.device) for x in tensors}
    if len(devices) > 1:
        raise ProblemError(f"q, k and v are on {', '.join(sorted(devices))}; move them to one device")
    said = _settings(settings)
    shard = AttentionProblem.from_tensors(*tensors, scale=said.scale, tensor_layout=said.tensor_layout)
    lse, mask = (as_flag(value, name, ProblemError) for name, value in wanted.items())
    if operands["mask"] is not None:
        blocks = as_instance(operands["mask"], BlockMask, "mask", MaskError).blocks
        if not isinstance(blocks, Tensor) or blocks.device != tensors[0].device:
            raise MaskError(f"the mask lives elsewhere than q ({tensors[0].device}); bring it with mask.like(q)")
    _check_lengths(operands["kv_lengths"], shard.batch)
    dispatch.asked(backend)
    return Call(
        ranks,
        shard,
        Shards.in_turn((shard.q_len,)),
        Shards.in_turn((shard.kv_len,)),
        said,
        _policy(said, operands),
        frozenset(name for name, value in operands.items() if value is not None),
        ("%out", *(("%lse",) if lse else ()), *(("%mask",) if mask else ())),
        backend,
    )


def _check_method(method: str, ranks: Ranks) -> None:
    one_of(method, METHODS, "method", ProblemError)
    is_mesh = isinstance(ranks, MeshRanks)
    if (method == "unified") != is_mesh:
        raise DistributedError(
            f"method={method!r} was given a group of {'two dimensions' if is_mesh else 'one dimension'}; "
            "method='unified' takes a DeviceMesh of two, as init_device_mesh('cuda', (2, 4), mesh_dim_names=('ring', "
            "'ulysses')), other methods one of its dimensions, as mesh['ulysses']"
        )


def _settings(given: Mapping[str, Any]) -> Settings:
    parts = given.get("parts")
    settings = settings_of({**given, "parts": tuple(parts)} if isinstance(parts, list) else given)
    one_of(settings.omitted, OMITTED, "omitted", ProblemError)
    one_of(settings.order, ORDERS, "order", ProblemError)
    checked(settings.precision, settings.rotate)
    settings.layout()
    return settings


def _policy(settings: Settings, operands: Mapping[str, Any]) -> Policy:
    policy = settings.chosen_policy(operands)
    if not isinstance(policy, Policy):
        raise PolicyError(f"policy={shown(policy)} is not a policy; give TopK(...), TopP(...), Hybrid(...) or Fixed()")
    return policy


def _numbers(given: Any) -> Any:
    """Numbers that have a shape."""
    return given if isinstance(given, Tensor | np.ndarray) else np.asarray(given)


def _check_lengths(lengths: Any, batch: int) -> None:
    if lengths is None:
        return
    given = _numbers(lengths)
    dtype = str(given.dtype).removeprefix("torch.")
    if tuple(given.shape) != (batch,) or not dtype.startswith(("int", "uint")):
        raise ProblemError(f"kv_lengths is {dtype} {tuple(given.shape)}; give integers [{batch}], one a sample")


def _record(method: str, call: Call, operands: Mapping[str, Any], device: str) -> dict[str, str]:
    """What has to be the same on all ranks, by name."""
    shard = call.shard
    tensors = f"batch={shard.batch} heads={shard.heads}/{shard.kv_heads} head_dim={shard.head_dim} {shard.dtype}"
    named = {name: repr(value) for name, value in call.settings._asdict().items()}
    return {
        "rainfusion": __version__,
        "method": repr(method),
        "q, k, v": tensors,
        "device": device,
        **named,
        "scale": repr(shard.scale),
        "policy": repr(call.policy),
        **{name: "not given" if value is None else _described(value) for name, value in operands.items()},
        "what is returned": ", ".join(call.returns),
    }


def _described(given: Any) -> str:
    """What is compared of an operand: its shape, since its content may be on a device."""
    if isinstance(given, BlockMask):
        return f"{tuple(given.blocks.shape)} in blocks of {given.block} of {given.layout!r}"
    return f"given, {_numbers(given).dtype} {tuple(_numbers(given).shape)}"


def _agreed(
    ranks: Ranks, method: str, balanced: bool, asked: Call | Exception, record: Mapping[str, str], like: Any
) -> Method:
    """What runs this call: settled among the ranks, now or for an equal call.

    Args:
        asked: the call as this rank sees it, or why there is none.
    """
    if isinstance(asked, Exception):
        agree(ranks, record, (0, 0), None, asked)
        raise asked
    known = _prepared.setdefault(ranks.group, dispatch.LruDict(_MOST_KINDS))
    mine = (asked.shard.q_len, asked.shard.kv_len)
    key = (*record.items(), mine, asked.backend, ranks)  # meshes may share a ring
    found = known.find(key)
    if found is not None and like.device.type != "cpu":  # to compare would make the host wait for the device
        return found[1]
    lengths, is_known = agree(ranks, record, mine, None if found is None else found[0])
    if found is not None and is_known:
        return found[1]
    error, run = None, None
    try:
        run = _prepare(method, balanced, asked, lengths, like)
    except Exception as failure:
        error = failure
    raise_together(ranks, error)
    assert run is not None
    known.pop(key, None)
    known.keep(key, (lengths, run))
    return run


def _prepare(method: str, balanced: bool, asked: Call, lengths: Lengths, like: Tensor) -> Method:
    """Plan and lower, so that what cannot be done is known before tensors travel."""
    layout = asked.settings.layout()
    q, kv = (shards_of(side, layout, balanced=balanced) for side in zip(*lengths, strict=True))
    call = replace(asked, q_shards=q, kv_shards=kv)
    run = Ulysses(call) if method in ("ulysses", "unified") else ByTokens(call, ring=method == "ring")
    for plan in run.plans:
        call.executable(plan, like)
    return run
