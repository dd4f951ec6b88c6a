"""How a diffusers model describes itself: which modules are its self-attention, and what their sequence is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rainfusion.core.checks import as_instance, one_of, shown
from rainfusion.core.errors import RainfusionError
from rainfusion.core.layout import TokenLayout
from rainfusion.integrations.engine import REST, LayerParts, Parts

Arguments = Mapping[str, Any]


class UnknownModelError(RainfusionError, ValueError):
    """A model that no adapter describes, or whose attention is left alone for a reason."""


class Order(NamedTuple):
    """The block order of a forward's tokens, as indices on a device."""

    order: Tensor
    inverse: Tensor

    def to_blocks(self, x: Tensor, axis: int) -> Tensor:
        """Tokens of the sequence in block order."""
        return x.index_select(axis, self.order)

    def from_blocks(self, x: Tensor, axis: int) -> Tensor:
        """Tokens in block order in the order of the sequence again."""
        return x.index_select(axis, self.inverse)


@lru_cache(maxsize=16)
def order_of(layout: TokenLayout, device: torch.device) -> Order:
    """The block order of a layout on a device."""
    order, inverse = layout.order, layout.inverse
    assert order is not None
    assert inverse is not None
    with torch.inference_mode(False):  # kept for calls that want gradients, too
        return Order(torch.tensor(order, device=device), torch.tensor(inverse, device=device))


@dataclass(frozen=True)
class Hoist:
    """Where tokens are brought into block order once a forward, instead of in every layer.

    Attributes:
        arguments: the forward's arguments, changed.
        outputs: by the name of a module, its output, changed.
        result: the forward's result, changed.
        fits: from the model and the forward's arguments, whether this forward's tokens can be reordered; None: always.
    """

    arguments: Callable[[Arguments, Order], Mapping[str, Any]] | None = None
    outputs: Mapping[str, Callable[[Any, Order], Any]] | None = None
    result: Callable[[Any, Order], Any] | None = None
    fits: Callable[[Any, Arguments], bool] | None = None


@dataclass(frozen=True)
class Adapter:
    """What rainfusion has to know of a model class.

    Args:
        layers: regular expression over names of modules, which matches the self-attention modules and no others.
        parts: from a model and its forward's arguments by name, the parts of the sequence in the order in which
            attention sees them: `Grid`, `Text` (attended to by all, and attends to all), `Tokens`, and `REST` for the
            text that takes what the other parts leave. Where layers see different sequences, a function from the
            layer's place to its parts. A reason as text where a forward is to stay dense.
        call: ``"dispatch"`` where the processors call diffusers' `dispatch_attention_fn` with their own backend,
            ``"sdpa"`` where they call `torch.nn.functional.scaled_dot_product_attention`.
        pads: whether a mask of keys may hide the end of the text, and nothing else. Without it, calls with a mask stay
            dense.
        prefix: whether keys may begin with tokens that no query stands for, as those of a cache; `parts` counts them.
            Without it, calls with fewer queries than keys stay dense.
        processor: a class to run instead of the processor that is there; see `processors`.
        hoist: where tokens can be reordered once a forward.
        split: how context parallelism of diffusers splits the sequence: ``"whole"`` as one tensor, ``"text_apart"`` all
            text and all images (or video) each by itself, in two runs of `parts`. Where it is not said, only a sequence
            of one grid may be split.
        prepare: from a forward's arguments those to change before anything else, without a change of the result.
        timestep: the forward's argument that is the noise level.
        family: of the model, for `rainfusion models`.
        tested: what was tested.

    Raises:
        UnknownModelError: `layers` is no regular expression, or `parts` no function.
    """

    layers: str
    parts: Callable[[Any, Arguments], Parts | LayerParts | str]
    call: str = "dispatch"
    pads: bool = False
    prefix: bool = False
    processor: type | None = None
    hoist: Hoist | None = None
    split: str = ""
    prepare: Callable[[Arguments], Mapping[str, Any]] | None = None
    timestep: str = "timestep"
    family: str = ""
    tested: str = ""

    def __post_init__(self) -> None:
        try:
            re.compile(as_instance(self.layers, str, "layers", UnknownModelError))
        except (re.error, OverflowError, RecursionError) as error:
            raise UnknownModelError(
                f"layers={shown(self.layers)} is no regular expression: {error}; give one such as "
                r"'blocks\.\d+\.attn1'"
            ) from error
        if not callable(self.parts):
            raise UnknownModelError(
                f"parts={shown(self.parts)} is no function; give one of the model and its forward's arguments"
            )
        one_of(self.call, ("dispatch", "sdpa"), "call", UnknownModelError)
        one_of(self.split, ("", "whole", "text_apart"), "split", UnknownModelError)

    def attention_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The self-attention modules of a model by name, in the order of the model.

        Raises:
            UnknownModelError: there are none.
        """
        found = {name: module for name, module in model.named_modules() if re.fullmatch(self.layers, name)}
        if not found:
            raise UnknownModelError(
                f"no module of {type(model).__name__} has a name that matches {self.layers!r}; correct its Adapter"
            )
        return found


_ADAPTERS: dict[str, Adapter] = {}
_LEFT_ALONE: dict[str, str] = {}


def register_adapter(model: str | type, adapter: Adapter) -> None:
    """Describe a model class, by itself or by name; the newest description counts.

    Raises:
        UnknownModelError: no class or name, or no Adapter.
    """
    if not isinstance(model, str | type):
        raise UnknownModelError(f"model={shown(model)} is not the class of a model, nor its name")
    as_instance(adapter, Adapter, "adapter", UnknownModelError)
    _ADAPTERS[model if isinstance(model, str) else model.__name__] = adapter


def leave_alone(model: str, why: str) -> None:
    """Say of a model class that its attention is left as it is."""
    _LEFT_ALONE[model] = why


def known() -> tuple[dict[str, Adapter], dict[str, str]]:
    """Adapters by the name of the model class, and the reasons for those left alone."""
    from rainfusion.integrations.diffusers import models

    models.load()
    return dict(_ADAPTERS), dict(_LEFT_ALONE)


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter of a model, by its class or the nearest of its bases; None where there is none."""
    adapters, _ = known()
    return next((adapters[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in adapters), None)


def refusal(model: nn.Module) -> UnknownModelError:
    """Why a model is not made sparse, and what to do."""
    name, (_, left_alone) = type(model).__name__, known()
    if name in left_alone:
        return UnknownModelError(f"{name} is left as it is: {left_alone[name]}")
    return UnknownModelError(
        f"{name} is not known; describe it with register_adapter({name!r}, Adapter(layers=<regular expression over its "
        "self-attention modules>, parts=<function of model and arguments: (Grid(frames, height, width), REST)>)); "
        "examples/own_model.py does. `rainfusion models` lists the known ones"
    )


def key_lengths(mask: Tensor) -> Tensor:
    """Valid keys of every sample, int32 ``[batch]``, from a mask ``[batch, ..., keys]`` that is True at valid keys."""
    return mask.reshape(mask.shape[0], -1, mask.shape[-1])[:, 0].sum(-1, dtype=torch.int32)


__all__ = [
    "REST",
    "Adapter",
    "Arguments",
    "Hoist",
    "LayerParts",
    "Order",
    "Parts",
    "UnknownModelError",
    "adapter_of",
    "key_lengths",
    "known",
    "leave_alone",
    "order_of",
    "refusal",
    "register_adapter",
]
