"""Forwards of a model kept, and run again later."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_THIN = 3  # odd, so that what is left of forwards in turn, such as cond and uncond, has both


@dataclass(frozen=True)
class Forward:
    """The arguments of a forward, copied before it ran, and where it ran.

    Attributes:
        context: as the pipeline calls it, such as ``"cond"``; None where it does not.
        autocast: the dtype of torch's autocast that was on; None where it was off.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: str | None
    device_type: str
    autocast: torch.dtype | None

    @classmethod
    def of(cls, model: nn.Module, args: Any, kwargs: Any, context: str | None) -> Forward:
        """A forward that is about to run."""
        device_type = next((p.device.type for p in model.parameters()), "cpu")
        is_on = torch.is_autocast_enabled(device_type)
        autocast = torch.get_autocast_dtype(device_type) if is_on else None
        return cls(copied(args), copied(kwargs), context, device_type, autocast)

    def run(self, model: Any) -> Tensor:
        """The model's output, its first tensor where there are several."""
        with ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.device_type, self.autocast))
            if self.context is not None and hasattr(model, "cache_context"):
                stack.enter_context(model.cache_context(self.context))
            output = model(*copied(self.args), **copied(self.kwargs))
        return first_tensor(output)


class Spread:
    """Forwards spread evenly over all that came, at most three times `limit` at a time."""

    def __init__(self, limit: int) -> None:
        self._limit, self._stride, self._seen = limit, 1, 0
        self._kept: list[Forward] = []

    @property
    def wants_next(self) -> bool:
        """Whether the next forward is one to keep."""
        return self._limit > 0 and self._seen % self._stride == 0

    def add(self, forward: Forward | None) -> None:
        """The next forward came; None where it is not to be kept."""
        if forward is not None:
            self._kept.append(forward)
        self._seen += 1
        if len(self._kept) == _THIN * self._limit:
            self._kept, self._stride = self._kept[::_THIN], self._stride * _THIN

    def chosen(self) -> list[Forward]:
        """At most `limit` forwards; where two contexts take turns, they do so here, too."""
        last, count = len(self._kept) - 1, min(len(self._kept), self._limit)
        places = [round(i * last / max(count - 1, 1)) for i in range(count)]
        return [self._kept[place - (place - i) % 2] for i, place in enumerate(places)]


def copied(value: Any) -> Any:
    """A copy of tensors and of the lists, tuples and dictionaries they are in; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(copied(item) for item in value)
    if type(value) is dict:
        return {name: copied(item) for name, item in value.items()}
    return value


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a model's output, which may be in a tuple, a list or a mapping."""
    if isinstance(output, Tensor):
        return output
    return first_tensor(next(iter(output.values() if isinstance(output, Mapping) else output)))
