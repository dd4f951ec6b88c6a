"""The way in: a name among diffusers' attention backends, and processors that lead a layer's attention to it.

Every self-attention module gets a copy of its processor, of a subclass that says which layer calls. The call itself
goes through diffusers' `dispatch_attention_fn` to the backend named ``rainfusion``, or, where a processor calls
torch's `scaled_dot_product_attention` itself, through a mode that takes this call over. In a compiled graph the call
is one operator: what the schedule says is read when the graph runs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _templated_context_parallel_attention,
    dispatch_attention_fn,
)
from torch import Tensor

from rainfusion.core.errors import ProblemError
from rainfusion.integrations.diffusers.adapter import Adapter, key_lengths
from rainfusion.integrations.diffusers.streams import Split, Streams, shards_of
from rainfusion.integrations.engine import Engine, HeadRange

_NAME = "rainfusion"
_BY_HAND = (
    f"the attention backend {_NAME!r} needs to know the layer that calls; use apply_rainfusion(pipe) instead of "
    "setting it by name"
)
_NO_RING = (
    "rainfusion runs in diffusers' context parallelism by heads alone; configure "
    "ContextParallelConfig(ulysses_degree=...) without ring_degree. For a model of your own, "
    "rainfusion.distributed.attention(method='ring') passes keys around"
)
_NO_GRADIENT_SPLIT = (
    "a gradient is wanted of a sequence that is split over devices, and rainfusion has none there; run under "
    "torch.no_grad(), or call remove() of its handle"
)
_NO_GRADIENT = (
    "a gradient is wanted, and sparse attention has none; run under torch.no_grad(), or configure on_grad='dense'"
)
# Rows for keys without a query are computed and thrown away: with fewer queries this costs more than it saves.
_QUERIES_A_MISSING_ONE = 8
_serials = itertools.count()
_layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()


class _Here(threading.local):
    """Which layer calls, on this thread."""

    place: Tensor | None = None
    on_grad: str = "raise"


_here = _Here()


def forget_place() -> None:
    """No layer calls on this thread: a processor that failed could not say so."""
    _here.place = None


class Layer:
    """A self-attention module of a model, and the processor it had.

    Args:
        index: its place among the model's self-attention modules.

    Attributes:
        streams: of the forward under way, where its sequence is split over devices.
        place: the layer's serial number as a tensor, so that one compiled graph serves all layers.
        processor: the one that leads to rainfusion.
        on_grad: as in the configuration, for compiled code to read.
    """

    def __init__(self, module: Any, index: int, adapter: Adapter, engine: Engine) -> None:
        self.module, self.index, self.adapter, self.engine = module, index, adapter, engine
        self.inner: Any = module.processor
        self.on_grad = engine.config.on_grad
        self.streams: Streams = ()
        _check_processor(self.inner)
        self._number()
        self.processor = _leading_here(self)

    def _number(self) -> None:
        serial = next(_serials)
        self.place = torch.tensor(serial, device="cpu")
        _layers[serial] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        twin = memo[id(self)] = object.__new__(Layer)
        twin.__dict__.update(
            {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "place"}
        )
        twin._number()
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise refuse_pickling()

    @property
    def is_bound(self) -> bool:
        """Whether the module still calls rainfusion."""
        if self.module.processor is not self.processor:
            return False
        return self.adapter.call == "sdpa" or self.processor._attention_backend is BACKEND

    def bind(self) -> None:
        """Let the module call rainfusion."""
        self.module.processor = self.processor

    def release(self) -> None:
        """Give the module its own processor back, unless it has another one by now.

        An attention backend that was set since stays set.
        """
        if self.module.processor is not self.processor:
            return
        backend = getattr(self.processor, "_attention_backend", BACKEND)
        if self.adapter.call == "dispatch" and backend is not BACKEND:
            self.inner._attention_backend = backend
        split = getattr(self.processor, "_parallel_config", None)
        if (
            getattr(self.inner, "_parallel_config", None) is not split
        ):  # a sequence that has been split since stays split
            self.inner._parallel_config = split
        self.module.processor = self.inner

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        dense: Callable[[], Tensor],
        heads: HeadRange | None = None,
        **call: Any,
    ) -> Tensor:
        """The attention of this layer, or of some of its heads, ``[batch, tokens, heads, head_dim]``."""
        why, lengths = self._misfit(q, k, mask, call["is_causal"]), None
        if mask is not None and not why:
            lengths = key_lengths(mask).expand(q.shape[0])
        if _gradient_wanted(q, k, v):
            why = self._without_gradient()
        missing = 0 if why else k.shape[1] - q.shape[1]
        if missing:
            q = torch.cat([q.new_zeros(q.shape[0], missing, *q.shape[2:]), q], dim=1)
        out: Tensor = self.engine.attend(
            self.index, q, k, v, dense, scale=call["scale"], kv_lengths=lengths, why_dense=why, heads=heads
        )
        return out[:, missing:] if out.shape[1] == q.shape[1] else out

    def _misfit(self, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> str:
        """What speaks against sparse attention in this call; nothing where it fits."""
        if is_causal:
            return "causal"
        missing = k.shape[1] - q.shape[1]
        if missing and not self.adapter.prefix:
            return "q and k differ in length"
        if not 0 <= _QUERIES_A_MISSING_ONE * missing <= q.shape[1]:
            return "too many keys without a query"
        if mask is None:
            return ""
        if not isinstance(mask, Tensor):
            return f"mask is a {type(mask).__name__}"
        return "" if self.adapter.pads and self._hides_keys_only(mask, q.shape[0]) else "mask"

    def _hides_keys_only(self, mask: Tensor, batch: int) -> bool:
        """Whether a mask is ``[batch, 1, 1, keys]``, or ``[batch, keys]``, which only diffusers reads so."""
        if mask.dtype != torch.bool:
            return False
        if mask.ndim == 2:
            return self.adapter.call == "dispatch" and mask.shape[0] == batch
        return mask.ndim == 4 and mask.shape[1:3] == (1, 1)

    def _without_gradient(self) -> str:
        if self.engine.config.on_grad == "dense":
            return "gradient"
        raise ProblemError(_NO_GRADIENT)


def refuse_pickling() -> TypeError:
    """What is raised where a model is pickled while rainfusion is applied."""
    return TypeError(
        "rainfusion is applied to this model, and a schedule under way cannot be pickled; call remove() of its handle "
        "first. copy.deepcopy and save_pretrained work"
    )


def _gradient_wanted(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check_processor(processor: Any) -> None:
    """Refuse what sparse attention would meet too late, in the middle of a forward."""
    if getattr(processor, "_attention_backend", None) == BACKEND:
        raise ProblemError(_BY_HAND)
    check_degrees(getattr(processor, "_parallel_config", None))


def check_degrees(parallel_config: Any) -> None:
    """Refuse context parallelism that does not split heads alone.

    Raises:
        ProblemError: it has a ring.
    """
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is not None and config.ring_degree > 1:
        raise ProblemError(_NO_RING)


# -- diffusers' dispatch -------------------------------------------------------------------------------


def _member(value: str) -> AttentionBackendName:
    """A new member of diffusers' enumeration of attention backends, which has no other way in."""
    if value in AttentionBackendName._value2member_map_:
        return AttentionBackendName(value)
    member = str.__new__(AttentionBackendName, value)
    member._name_, member._value_ = value.upper(), value
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._member_names_.append(member._name_)
    AttentionBackendName._value2member_map_[value] = member
    return member


BACKEND = _member(_NAME)


@_AttentionBackendRegistry.register(BACKEND, supports_context_parallel=True)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The backend ``rainfusion``; q, k, v and the result are ``[batch, tokens, heads, head_dim]``."""
    if dropout_p:
        raise ProblemError("sparse attention has no dropout; call eval() of the model")
    place = _here.place
    if place is None:
        raise ProblemError(_BY_HAND)
    if _parallel_config is None:
        return _call(query, key, value, attn_mask, place, is_causal, scale, enable_gqa)
    return _split(query, key, value, attn_mask, place, is_causal, scale, enable_gqa, _parallel_config)


def _split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    place: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    parallel_config: Any,
) -> Tensor:
    """`_call` inside of diffusers' Ulysses: it exchanges tokens for heads before, and heads for tokens after."""
    check_degrees(parallel_config)
    if _gradient_wanted(q, k, v):
        raise ProblemError(_NO_GRADIENT_SPLIT)
    config, total = parallel_config.context_parallel_config, q.shape[2]
    rank, ranks = config._ulysses_local_rank, config.ulysses_degree
    split = Split(rank * -(-total // ranks), total, ranks, rank, q.shape[1])

    def of_some_heads(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *_: Any, **__: Any) -> Tensor:
        return _call(q, k, v, mask, place, is_causal, scale, enable_gqa, split)

    out: Tensor = _templated_context_parallel_attention(
        q,
        k,
        v,
        mask,
        0.0,
        is_causal,
        scale,
        enable_gqa,
        False,
        forward_op=of_some_heads,
        backward_op=_refuse_gradient,
        _parallel_config=parallel_config,
    )
    return out


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    place: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    split: Split | None = None,
) -> Tensor:
    """`_attend`, or in a graph that is being compiled, one operator that does it when the graph runs.

    Where a graph wants a gradient and the configuration allows it, the graph has dense attention itself, and the
    report counts the layer as not called.

    Args:
        split: what this device has, where heads are split over devices.
    """
    if not torch.compiler.is_compiling():
        return _attend(q, k, v, mask, place, is_causal, scale, enable_gqa, split)
    if _gradient_wanted(q, k, v) and _here.on_grad == "dense":
        call = {"attn_mask": mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        dense: Tensor = dispatch_attention_fn(q, k, v, backend=AttentionBackendName.NATIVE, **call)
        return dense
    out: Tensor = _operator(q, k, v, mask, place, is_causal, scale, enable_gqa, [*(split or ())])
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    place: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    split: Split | None,
) -> Tensor:
    layer, calling = _layers[int(place)], _here.place
    call = {"is_causal": is_causal, "scale": scale}
    shards = None if split is None or len(layer.streams) < 2 else shards_of(layer.streams, q.shape[1], split)
    if shards is not None:
        q, k, v = (shards.to_sequence(x, 1) for x in (q, k, v))
        mask = _in_sequence(mask, shards)

    def dense() -> Tensor:
        if layer.adapter.call == "sdpa":
            qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
            own: Any = F.scaled_dot_product_attention
            attended: Tensor = own(qt, kt, vt, attn_mask=mask, enable_gqa=enable_gqa, **call)
            return attended.transpose(1, 2)
        forget_place()  # the host's own attention must not lead here again
        backend = layer.inner._attention_backend
        out: Tensor = dispatch_attention_fn(q, k, v, attn_mask=mask, enable_gqa=enable_gqa, backend=backend, **call)
        _here.place = calling
        return out

    heads = None if split is None else HeadRange(split.first, split.first + q.shape[2], split.total)
    out = layer.attend(q, k, v, mask, dense, heads, **call)
    return out if shards is None else shards.to_ranks(out, 1)


def _in_sequence(mask: Any, shards: Any) -> Any:
    """A mask of the keys of all devices, in the order of the sequence."""
    if not isinstance(mask, Tensor):
        return mask
    if mask.ndim > 2 and mask.shape[-2] > 1:
        mask = shards.to_sequence(mask, mask.ndim - 2)
    return shards.to_sequence(mask, mask.ndim - 1)


# -- torch's own function ------------------------------------------------------------------------------


class _TakeOver(torch.overrides.TorchFunctionMode):
    """Takes over `scaled_dot_product_attention`; q, k and v there are ``[batch, heads, tokens, head_dim]``.

    A call with dropout, which sparse attention does not have, is left as it is, and is in no report.
    """

    def __init__(self, place: Tensor) -> None:
        super().__init__()
        self._place = place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:  # Python code of torch, which it cannot trace by this name
            return args[0].unflatten(*args[1:], **kwargs)
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _take_over(self._place, *args, **kwargs)


def _take_over(
    place: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return _call(q, k, v, attn_mask, place, is_causal, scale, enable_gqa).transpose(1, 2)


# -- compiled graphs -----------------------------------------------------------------------------------

# What the schedule decides must not be frozen into a CUDA graph.
_TAGS = [tag] if (tag := getattr(torch._C.Tag, "cudagraph_unsafe", None)) is not None else []


@torch.library.custom_op("rainfusion::layer", mutates_args=(), tags=_TAGS)
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    place: Tensor,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    split: list[int],
) -> Tensor:
    """`_attend` as one operator of a graph; the result is contiguous, as its fake says."""
    share = Split(*split) if split else None
    return _attend(q, k, v, mask, place, is_causal, scale, enable_gqa, share).contiguous()


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _refuse_gradient(*_: Any) -> Any:
    raise ProblemError(_NO_GRADIENT)


_operator.register_autograd(_refuse_gradient)


# -- processors ----------------------------------------------------------------------------------------


def _leading_here(layer: Layer) -> Any:
    """A copy of the layer's processor that leads its attention to rainfusion."""
    own = layer.adapter.processor
    processor = copy.copy(layer.inner)  # before it has its own way of being copied
    inner: Any = type(layer.inner)
    processor.__class__ = _subclass(inner, layer.adapter.call, own)
    processor.layer = layer
    if layer.adapter.call == "dispatch":
        processor._attention_backend = BACKEND
    return processor


@lru_cache(maxsize=64)
def _subclass(inner: Any, call: str, own: Any) -> Any:
    """A subclass of a processor's class that says which layer calls.

    Args:
        own: a class whose `__call__` runs instead of the processor's.
    """
    run = (own or inner).__call__

    # The signature is that of the processor: `Attention.forward` drops what a processor does not name.
    @functools.wraps(inner.__call__)
    def dispatching(self: Any, *args: Any, **kwargs: Any) -> Any:
        _here.place, _here.on_grad = self.layer.place, self.layer.on_grad
        result = run(self, *args, **kwargs)
        _here.place = None
        return result

    @functools.wraps(inner.__call__)
    def taking_over(self: Any, *args: Any, **kwargs: Any) -> Any:
        _here.on_grad = self.layer.on_grad
        with _TakeOver(self.layer.place):
            return run(self, *args, **kwargs)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def refuse(self: Any, protocol: Any) -> Any:
        raise refuse_pickling()

    call_it = dispatching if call == "dispatch" else taking_over
    body = {"__call__": call_it, "__deepcopy__": deepcopy, "__reduce_ex__": refuse, "__module__": inner.__module__}
    return type(inner)(f"RainFusion{inner.__name__}", (inner,), body)
