"""Head budgets: the share of block pairs that every head of a model skips, bound to the model they were solved for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rainfusion.core.checks import as_int, as_share, as_sizes, one_of, shown
from rainfusion.core.errors import PolicyError
from rainfusion.core.parts import SINKS, Sink
from rainfusion.core.windows import Sizes

_LONGEST_TEXT = 200
_MOST_HEADS = 2**18  # of all layers: tables of a file stay small
_MOST_GRIDS = 64
_MOST_MODELS = 16
OMITTED = ("drop", "summary")


class CalibrationError(PolicyError):
    """A calibration, or head budgets, that is none, or was made for another model."""


@dataclass(frozen=True)
class Binding:
    """What errors were measured on, and budgets therefore hold for.

    Args:
        model: name of the model's class.
        digest: SHA-256 of the model's configuration, in hexadecimal.
        layers, heads: self-attention layers, and heads of each.
        grids: grids of the sequences that were measured, such as ``"21x45x80"``.
        block: tokens a block, (query, key).
        window, sink, omitted: as in `RainFusionConfig`; sink always a tuple of names.

    Raises:
        CalibrationError: a value of another kind.
    """

    model: str
    digest: str
    layers: int
    heads: int
    grids: tuple[str, ...]
    block: tuple[int, int]
    window: Sizes | None
    sink: tuple[str, ...]
    omitted: str

    def __post_init__(self) -> None:
        for name in ("model", "digest", "omitted"):
            as_text(getattr(self, name), name)
        one_of(self.omitted, OMITTED, "omitted", CalibrationError)
        for name in ("layers", "heads"):
            set_field(self, name, as_int(getattr(self, name), name, CalibrationError))
        if self.layers * self.heads > _MOST_HEADS:
            raise CalibrationError(
                f"{self.layers} layers of {self.heads} heads are more than {_MOST_HEADS} heads in all"
            )
        set_field(self, "grids", tuple(as_text(grid, "grids") for grid in as_list(self.grids, "grids", _MOST_GRIDS)))
        set_field(self, "block", as_sizes(self.block, 2, "block", CalibrationError))
        if self.window is not None:
            set_field(self, "window", as_sizes(self.window, 3, "window", CalibrationError))
        set_field(self, "sink", tuple(as_list(self.sink, "sink", len(SINKS))))
        for name in self.sink:
            one_of(name, SINKS[:-1], "sink", CalibrationError)
        set_field(self, "sink", sinks_of(self.sink))

    def objection(self, model: str, digest: str, layers: int) -> str:
        """Why this is not the model that is bound, and what to do; empty where it is."""
        if model != self.model:
            said = f"this is {model}, and they were made for {self.model}"
        elif digest != self.digest:
            said = f"they were made for a {model} of another configuration ({self.digest[:12]}, not {digest[:12]})"
        elif layers != self.layers:
            said = f"this model has {layers} layers, and they were made for {self.layers}"
        else:
            return ""
        return f"{said}; calibrate this one"

    def mismatch(self, block: int | tuple[int, int], window: Sizes | None, sink: Sink) -> str:
        """Which settings of blocks are not those that are bound, and what to give instead; empty where all are."""
        given = {"block": pair_of(block), "window": window, "sink": sinks_of(sink)}
        wrong = [name for name, value in given.items() if value != getattr(self, name)]
        said = ", ".join(f"{name}={getattr(self, name) or None!r}, not {given[name] or None!r}" for name in wrong)
        return f"they were made with {said}; give what they were made with" if wrong else ""


@dataclass(frozen=True)
class ModelBudgets:
    """The budgets of one model.

    Args:
        name: of the model in its pipeline, such as ``"transformer_2"``.
        shares: of block pairs to skip, in [0, 1), ``[layers][heads]``.

    Raises:
        CalibrationError: shares out of range, or of another number than layers and heads.
    """

    name: str
    binding: Binding
    shares: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        as_text(self.name, "name")
        if not isinstance(self.binding, Binding):
            set_field(self, "binding", record_as(Binding, self.binding, "binding"))
        layers = as_list(self.shares, "shares", self.binding.layers, self.binding.layers)
        heads = self.binding.heads
        set_field(self, "shares", tuple(_shares(as_list(layer, "shares", heads, heads)) for layer in layers))

    @property
    def sparsity(self) -> float:
        """The mean share over all heads, those of dense layers counted in."""
        return sum(map(sum, self.shares)) / (self.binding.layers * self.binding.heads)


@dataclass(frozen=True)
class HeadBudgets:
    """A share of block pairs to skip for every head of one model or of several, as `Calibration.budget` solves them.

    Args:
        models: the budgets of every model of a pipeline.
        sparsity: the mean share that was asked for.
        ranks: devices that carry equal work in every layer where heads are split in order.

    Raises:
        CalibrationError: no models, or two of one name.
    """

    models: tuple[ModelBudgets, ...]
    sparsity: float
    ranks: int = 1

    def __post_init__(self) -> None:
        set_field(self, "models", named_records(ModelBudgets, self.models, "models"))
        set_field(self, "sparsity", as_share(self.sparsity, "sparsity", CalibrationError, top=False))
        set_field(self, "ranks", as_int(self.ranks, "ranks", CalibrationError))

    def of(self, name: str) -> ModelBudgets:
        """The budgets of a model by its name.

        Budgets of one model alone also serve where it, or they, have the name of the class instead of one in a
        pipeline.

        Raises:
            CalibrationError: none has that name.
        """
        for model in self.models:
            if name == model.name:
                return model
        only = self.models[0]
        if len(self.models) == 1 and (name.startswith(only.binding.model) or only.name.startswith(only.binding.model)):
            return only
        names = ", ".join(model.name for model in self.models)
        raise CalibrationError(
            f"these are budgets of {names}, and none is of {shown(name)}; apply them to the pipeline they were made "
            "with, or calibrate this model"
        )

    def to_dict(self) -> dict[str, Any]:
        """The budgets as plain JSON values; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Any) -> HeadBudgets:
        """The budgets that `to_dict` wrote; nothing in them is trusted.

        Raises:
            CalibrationError: anything else.
        """
        budgets: HeadBudgets = record_as(cls, record, "head budgets")
        return budgets


# -- checks that calibrations share --------------------------------------------------------------------


def set_field(record: Any, name: str, value: Any) -> None:
    """Give a frozen dataclass a field that was checked."""
    object.__setattr__(record, name, value)


def as_text(value: Any, name: str) -> str:
    """A short text that can be shown."""
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not value.isprintable():
        raise CalibrationError(f"{name}={shown(value)} is not a text of at most {_LONGEST_TEXT} letters")
    return value


def as_list(value: Any, name: str, most: int, least: int = 0) -> list[Any]:
    """The items of a list or tuple of `least` to `most` of them."""
    if not isinstance(value, list | tuple) or not least <= len(value) <= most:
        allowed = str(most) if least == most else f"{least} to {most}"
        given = f"has {len(value)} items" if isinstance(value, list | tuple) else f"is {shown(value)}"
        raise CalibrationError(f"{name} {given}; give a list of {allowed}")
    return list(value)


def as_record(value: Any, name: str) -> dict[str, Any]:
    """A mapping with names for keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise CalibrationError(f"{name}={shown(value)} is not an object with names")
    return dict(value)


def named_records(cls: type[Any], values: Any, name: str) -> tuple[Any, ...]:
    """One record a model, given as themselves or as mappings; each has a name of its own."""
    records = tuple(v if isinstance(v, cls) else record_as(cls, v, name) for v in as_list(values, name, _MOST_MODELS))
    names = [record.name for record in records]
    if not names or len({*names}) < len(names):
        raise CalibrationError(f"models are named {shown(names)}; give one or more, each under a name of its own")
    return records


def pair_of(block: int | tuple[int, int]) -> tuple[int, int]:
    """Tokens a block, (query, key)."""
    return block if isinstance(block, tuple) else (block, block)


def sinks_of(sink: Sink) -> tuple[str, ...]:
    """The names of a sink, in one order: a sink is the same however its frames are listed."""
    named = (sink,) if isinstance(sink, str) else tuple(sink or ())
    return tuple(sorted(named))


def record_as(cls: type[Any], record: Any, name: str) -> Any:
    """The dataclass whose fields a mapping gives by name."""
    try:
        return cls(**as_record(record, name))
    except TypeError as error:  # names that it does not have, or lacks
        raise CalibrationError(f"{name} cannot be read: {str(error)[:200]}") from None


def _shares(values: list[Any]) -> tuple[float, ...]:
    return tuple(as_share(value, "shares", CalibrationError, top=False) for value in values)
