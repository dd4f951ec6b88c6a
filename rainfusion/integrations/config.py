"""What users say about a model: how much to skip, where and when; one frozen object for every host, JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from rainfusion.core import precision as precisions
from rainfusion.core.checks import LARGEST, as_int, as_number, one_of, shown
from rainfusion.core.errors import LayoutError, PolicyError
from rainfusion.core.layout import TokenLayout
from rainfusion.core.parts import SINKS, Sink
from rainfusion.core.policies import TopK
from rainfusion.core.windows import Sizes
from rainfusion.integrations.calibration import Calibration
from rainfusion.integrations.head_budgets import CalibrationError, HeadBudgets

Share = float | tuple[float, ...]
"""Of block pairs to skip: one for all heads, or one a head."""
LayerShares = Share | Mapping[int, Share]
"""The same, or by layer; layers that are not named are dense."""
Shares = LayerShares | HeadBudgets | Calibration
"""The same, or budgets that were solved for a model."""

AUTO = "auto"
_CHOICES = {"omitted": ("drop", "summary"), "order": ("auto", "layer"), "on_grad": ("raise", "dense")}
_COUNTS = {"num_steps": 1, "refresh_every": 1, "min_blocks": 0, "report_rows": 0}
_OPTIONAL = ("num_steps", "min_blocks")
_MOST_DIGITS = 10


class ConfigError(PolicyError):
    """A configuration that no model could follow."""


class Sinks(NamedTuple):
    """Which frames of a grid are never skipped.

    Attributes:
        sink: as in `RainFusionConfig`.
        kept: share of block pairs that is kept, at the least.
    """

    sink: Sink
    kept: float

    def of(self, frames: int) -> Sink:
        """The sink of a grid of that many frames.

        ``"auto"`` is the first frame, unless its rows and columns would take more than half of what is kept: they leave
        too little for the best blocks then (ours; docs/quality.md).
        """
        if self.sink != AUTO:
            return self.sink
        protected = 1 - (1 - 1 / frames) ** 2
        return "first_frame" if protected <= self.kept / 2 else None


@dataclass(frozen=True)
class RainFusionConfig:
    """How the self-attention of a model is made sparse.

    Args:
        sparsity: share of block pairs to skip, in [0, 1): one, one a head, or by layer ``{layer: share}``, where layers
            that are not named are dense; or a `Calibration` or `HeadBudgets`, whose budgets are bound to a model. 0 is
            dense.
        sparsity_from_step: ``{step: sparsity}``: another sparsity from that denoising step on, counted from 0.
        dense_steps: denoising steps that are dense at the start and at the end of a run. At the end needs the number
            of steps: a pipeline that says it, or `num_steps`.
        num_steps: denoising steps of a run, where the host does not say it.
        dense_layers: layers that are always dense; negative numbers count from the last.
        block, window, omitted, precision, rotate: as in `rainfusion.attention`. Dense steps and layers keep the host's
            own attention, in the model's dtype.
        sink: frames that are never skipped, as in `rainfusion.attention`, or ``"auto"``: the first frame, unless its
            rows and columns would take more than half of what the sparsity keeps, or skipped blocks are summarised;
            with head budgets what they were measured with. Sink and window apply to grids of several frames, unless
            the model's adapter says otherwise.
        refresh_every: denoising steps that a block mask is used for at most; 1 selects anew at every step.
        reuse_drift: a head's mask is used again only while the head has drifted no further than this since the mask was
            made, as `rainfusion.integrations.drift` measures it: 0 for queries and keys that stay as they are, 0.1
            where either changes by a tenth. None: age alone decides. Needs `refresh_every` above 1.
        share_masks: one mask for all contexts of a step ("cond" and "uncond"), made by the first.
        order: ``"auto"`` keeps tokens in window order through the whole model where the host knows how; ``"layer"``
            orders them in every layer.
        min_blocks: unprotected query blocks below which attention stays dense. None: 32, and dense also where the
            backend estimates that skipping blocks does not pay; a number switches that estimate off.
        backend: name of a rainfusion backend; default: the best for the device.
        on_grad: ``"raise"`` where a gradient is wanted, which sparse attention does not have, or ``"dense"``.
        report_rows: rows a report keeps, the newest.
        timed: measure the time of every attention call, for the report.

    Raises:
        ConfigError: a value out of range; it says which, and what is allowed.
        LayoutError: a block, window or sink that is none.
    """

    sparsity: Shares = 0.8
    sparsity_from_step: Mapping[int, Shares] = field(default_factory=dict)
    dense_steps: tuple[int, int] = (0, 0)
    num_steps: int | None = None
    dense_layers: tuple[int, ...] = ()
    block: int | tuple[int, int] = 128
    window: Sizes | None = None
    sink: Sink = AUTO
    omitted: str = "drop"
    precision: str | None = None
    rotate: bool = False
    refresh_every: int = 1
    reuse_drift: float | None = None
    share_masks: bool = False
    order: str = "auto"
    min_blocks: int | None = None
    backend: str | None = None
    on_grad: str = "raise"
    report_rows: int = 65536
    timed: bool = False

    def __post_init__(self) -> None:
        self._set("sparsity", _shares(self.sparsity, "sparsity"))
        self._set("sparsity_from_step", _by_step(self.sparsity_from_step))
        self._set("dense_steps", _pair(self.dense_steps))
        self._set("dense_layers", _layers(self.dense_layers))
        if is_named := isinstance(self.sink, str):
            one_of(self.sink, (*SINKS, AUTO), "sink", LayoutError)
        sink = None if is_named and self.sink == AUTO else self.sink
        TokenLayout((2, 64, 64), window=self.window, block=self.block, sink=sink)  # refuses what is none
        for name in ("block", "window", "sink"):
            self._set(name, _unaliased(getattr(self, name)))
        for name, allowed in _CHOICES.items():
            one_of(getattr(self, name), allowed, name, ConfigError)
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._set(name, as_int(value, name, ConfigError, minimum=least))
        self._set("reuse_drift", _drift(self.reuse_drift, self.refresh_every))
        for name in ("share_masks", "timed", "rotate"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={shown(getattr(self, name))} is neither True nor False")
        precisions.checked(self.precision, self.rotate, ConfigError)
        if not isinstance(self.backend, str | None):
            raise ConfigError(
                f"backend={shown(self.backend)} is not the name of a backend; `rainfusion devices` lists them"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __reduce__(self) -> tuple[Any, ...]:
        return RainFusionConfig.from_json, (self.to_json(),)

    @property
    def sinks(self) -> Sinks:
        """Which frames of a grid are never skipped."""
        sink = None if self.sink == AUTO and self.omitted == "summary" else self.sink
        return Sinks(sink, 1 - max(map(_most, (self.sparsity, *self.sparsity_from_step.values()))))

    def head_budgets(self) -> dict[str, HeadBudgets]:
        """The budgets that were solved for a model, by what names them: ``sparsity``, or a step's."""
        named = {
            "sparsity": self.sparsity,
            **{f"sparsity_from_step[{n}]": s for n, s in self.sparsity_from_step.items()},
        }
        return {name: shares for name, shares in named.items() if isinstance(shares, HeadBudgets)}

    def for_model(self, name: str, model: str, digest: str, layers: int) -> RainFusionConfig:
        """The configuration of one model: the shares that head budgets give it stand in place of the budgets.

        Args:
            name: of the model in its pipeline.
            model, digest, layers: as in `Binding`.

        Raises:
            ConfigError: budgets of another model, or of other blocks; it says what differs.
        """
        by_layer: dict[str, Mapping[int, Share]] = {}
        sink = self.sink
        for given, budgets in self.head_budgets().items():
            try:
                own = budgets.of(name)
            except CalibrationError as error:
                raise ConfigError(f"{given}: {error}") from None
            bound = own.binding
            sink = (bound.sink or None) if sink == AUTO else sink
            objection = bound.objection(model, digest, layers) or bound.mismatch(self.block, self.window, sink)
            if objection:
                raise ConfigError(f"the head budgets in {given} do not fit {name}: {objection}")
            by_layer[given] = dict(enumerate(own.shares))
        steps = {n: by_layer.get(f"sparsity_from_step[{n}]", shares) for n, shares in self.sparsity_from_step.items()}
        return replace(self, sparsity=by_layer.get("sparsity", self.sparsity), sparsity_from_step=steps, sink=sink)

    def to_json(self) -> str:
        """The configuration as JSON: one object with the arguments by name."""
        return json.dumps({name: _plain(getattr(self, name)) for name in (f.name for f in fields(self))})

    @classmethod
    def from_json(cls, text: str) -> RainFusionConfig:
        """The configuration that `to_json` wrote, or one written by hand; arguments left out have their default.

        Raises:
            ConfigError: not a JSON object, or an argument that there is not.
        """
        try:
            record = json.loads(text, object_pairs_hook=_without_duplicates)
        except (TypeError, ValueError, RecursionError) as error:
            said = str(error)[:200]
            raise ConfigError(f"a configuration is a JSON object, and this is not one: {said}") from None
        if not isinstance(record, dict):
            raise ConfigError(f"a configuration is a JSON object, and this is a {type(record).__name__}")
        return cls.of(record)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> RainFusionConfig:
        """The configuration with these arguments by name.

        Raises:
            ConfigError: an argument that there is not, or a value out of range.
        """
        if not isinstance(settings, Mapping):
            raise ConfigError(f"settings={shown(settings)} is no mapping; give the arguments by name, such as a dict")
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise ConfigError(
                f"{', '.join(map(shown, unknown[:3]))} is no argument of a configuration; choose from "
                f"{', '.join(known)}"
            )
        return cls(**settings)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a name is there twice")
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, HeadBudgets):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [*value] if isinstance(value, tuple) else value


def _unaliased(value: Any) -> Any:
    """A number, text or sequence that was checked, as Python's own type."""
    if isinstance(value, list | tuple):
        return tuple(_unaliased(item) for item in value)
    return value if value is None or isinstance(value, str) else int(value)


def _shares(value: Any, name: str) -> Shares:
    if isinstance(value, Calibration | HeadBudgets) or (isinstance(value, Mapping) and "models" in value):
        return _head_budgets(value, name)
    if isinstance(value, Mapping) and "tables" in value:
        raise ConfigError(
            f"{name} is the JSON of a calibration; give Calibration.load(file), or the JSON of `rainfusion budgets`"
        )
    if isinstance(value, Mapping):
        shares = {_index(key, name): _share(item, f"{name}[{shown(key)}]") for key, item in value.items()}
        return MappingProxyType(dict(sorted(shares.items())))
    return _share(value, name)


def _head_budgets(value: Any, name: str) -> HeadBudgets:
    """Budgets as they are, as a calibration's own, or as JSON writes them."""
    try:
        if isinstance(value, Calibration):
            return value.budget()
        return value if isinstance(value, HeadBudgets) else HeadBudgets.from_dict(value)
    except CalibrationError as error:
        raise ConfigError(f"{name}: {error}") from None


def _share(value: Any, name: str) -> Share:
    share = tuple(value) if isinstance(value, list | tuple) else value
    try:
        return TopK(share).sparsity
    except PolicyError as error:
        raise ConfigError(f"{name}: {error}") from None


def _by_step(value: Any) -> Mapping[int, Shares]:
    name = "sparsity_from_step"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}={shown(value)} is not a mapping; give {{10: 0.9}}, for example")
    steps = {_index(step, name): _shares(item, f"{name}[{shown(step)}]") for step, item in value.items()}
    return MappingProxyType(dict(sorted(steps.items())))


def _index(key: Any, name: str) -> int:
    """A layer or step; JSON writes it as text."""
    is_written = isinstance(key, str) and len(key) <= _MOST_DIGITS and key.isascii() and key.isdecimal()
    number = int(key) if is_written else key
    if isinstance(key, str) and str(number) != key:
        raise ConfigError(f"{name} has the key {shown(key)}; write {number}")
    return as_int(number, f"a key of {name}", ConfigError, minimum=0)


def _pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigError(f"dense_steps={shown(value)} is not (steps at the start, steps at the end)")
    first, last = (as_int(item, "dense_steps", ConfigError, minimum=0) for item in value)
    return first, last


def _drift(value: Any, refresh_every: int) -> float | None:
    if value is None:
        return None
    drift = as_number(value, "reuse_drift", ConfigError, "a number from 0, or None")
    if drift < 0:
        raise ConfigError(f"reuse_drift={shown(value)} is below 0; give a number from 0, or None")
    if refresh_every == 1:
        raise ConfigError(
            f"reuse_drift={shown(value)} has no effect with refresh_every=1, which selects anew at every step; give "
            "refresh_every=8, for example, or leave reuse_drift out"
        )
    return drift


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"dense_layers={shown(value)} is not a tuple of layer numbers")
    return tuple(as_int(item, "dense_layers", ConfigError, minimum=-LARGEST) for item in value)


def _most(shares: Shares) -> float:
    """The largest share of block pairs that a layer skips."""
    if isinstance(shares, HeadBudgets | Calibration):
        return shares.sparsity
    by_layer = shares.values() if isinstance(shares, Mapping) else (shares,)
    return max((sum(s) / len(s) if isinstance(s, tuple) else s for s in by_layer), default=0.0)
