"""What a mask that is used again costs: drift beside error, measured in a run, and the limit of drift that follows.

Every head's mask is kept for some steps while the run itself selects anew at each, so that what is measured does not
change what comes after. At each step between, a head gives one row: its drift since the mask was made, and the error of
its output with that mask and with a fresh one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import device as device_of

from rainfusion.core.arrays import namespace, to_numpy
from rainfusion.core.checks import as_instance, as_number, shown
from rainfusion.core.mask import PackedMask
from rainfusion.core.ops.means import compute_dtype
from rainfusion.integrations.call import Call
from rainfusion.integrations.clock import Moment
from rainfusion.integrations.config import ConfigError, RainFusionConfig
from rainfusion.integrations.drift import Means, Sampler, drift, sampled_tokens

Array = Any


class DriftRow(NamedTuple):
    """One head at one step.

    Attributes:
        model: name of the model in its pipeline.
        run, step, context, layer: where it was measured; runs, steps and layers from 0.
        age: steps since the mask was made.
        drift: of the head since then, as `rainfusion.integrations.drift` measures it.
        stale_error, fresh_error: of the head's output with that mask and with one made now: the norm of its difference
            from dense attention by the norm of dense attention, over the unprotected queries that are sampled.
    """

    model: str
    run: int
    step: int
    context: str
    layer: int
    head: int
    age: int
    drift: float
    stale_error: float
    fresh_error: float


def drift_threshold(rows: Iterable[DriftRow], extra: float = 0.1) -> float:
    """The largest `RainFusionConfig.reuse_drift` at which heads that use a mask again lose little by it.

    Args:
        rows: measured, such as by `rainfusion.integrations.diffusers.measure_drift`.
        extra: how much larger the error of these heads may be on average than with fresh masks, as a share of it.

    Returns:
        The drift of a row, or 0.0 where even the rows of the least drift lose more: masks are then used again only
        while nothing changes.

    Raises:
        ConfigError: no rows or other things, an error that is not finite, or `extra` below 0.
    """
    if as_number(extra, "extra", ConfigError, "a number from 0") < 0:
        raise ConfigError(f"extra={shown(extra)} is below 0; give a number from 0")
    listed = [as_instance(row, DriftRow, "a row", ConfigError) for row in rows]
    # A drift that is NaN never uses a mask again.
    ascending = sorted((row for row in listed if not math.isnan(row.drift)), key=lambda row: row.drift)
    if not ascending:
        raise ConfigError("there are no rows; measure them with refresh_every above 1 in a run of two steps or more")
    drifts = np.asarray([row.drift for row in ascending])
    stale, fresh = (np.cumsum([getattr(row, name) for row in ascending]) for name in ("stale_error", "fresh_error"))
    if not np.isfinite([stale[-1], fresh[-1]]).all():
        raise ConfigError("the rows have errors that are not finite; look for NaN in the model's output")
    is_last_of_equals = np.append(drifts[1:] > drifts[:-1], True)
    fits = is_last_of_equals & (stale <= (1 + extra) * fresh * (1 + 1e-12)) & np.isfinite(drifts)
    return float(drifts[fits][-1]) if fits.any() else 0.0


class _Kept(NamedTuple):
    moment: Moment
    mask: PackedMask
    means: Means


class DriftProbe:
    """A probe of an engine that measures its model, and lets it go on with fresh masks. It waits for the device.

    Args:
        config: whose `refresh_every` says how many steps a mask is kept.
        name: of the model, for the rows.
        rows: where they go.
    """

    def __init__(self, config: RainFusionConfig, name: str, rows: list[DriftRow]) -> None:
        self._every, self._name, self._rows = config.refresh_every, name, rows
        self._sampler = Sampler()
        self._kept: dict[Any, _Kept] = {}
        self._run = -1

    def __call__(self, call: Call) -> Array:
        """Attention with a fresh mask."""
        mask, moment = call.select(range(call.heads)), call.moment
        out = call.masked(mask)
        if moment.run != self._run:
            self._kept.clear()
            self._run = moment.run
        means = self._sampler.means(call.q, call.k, call.layout, call.order)
        place = moment.context, call.fit  # which may be shared by contexts
        kept = self._kept.get(place)
        age = self._every if kept is None else moment.step - kept.moment.step
        if kept is None or not 0 < age < self._every:
            self._kept[place] = _Kept(moment, mask.packed(), means)
        else:
            self._measure(call, out, means, kept)
        return out

    def _measure(self, call: Call, out: Array, means: Means, kept: _Kept) -> None:
        moment, places = call.moment, sampled_tokens(call.layout, call.q.shape[1], 0, call.order).reshape(-1)
        errors = _errors((call.masked(kept.mask.unpacked()), out), call.dense(), places)
        drifts = map(float, to_numpy(drift(means, kept.means)))
        where = (self._name, moment.run, moment.step, moment.context, call.layer)
        for head, numbers in enumerate(zip(drifts, *errors, strict=True)):
            self._rows.append(DriftRow(*where, head, moment.step - kept.moment.step, *numbers))


def _errors(outputs: Iterable[Array], dense: Array, places: np.ndarray) -> list[list[float]]:
    """The relative error of every head, for each output.

    Args:
        outputs: ``[batch, tokens, heads, head_dim]``.
        dense: as they are; the host may have left out leading tokens, which are keys only.
        places: of the queries that count.
    """
    xp = namespace(dense)
    errors = []
    for out in outputs:
        missing = out.shape[1] - dense.shape[1]
        index = xp.asarray(places[places >= missing], device=device_of(dense))
        exact, given = (
            xp.astype(xp.take(x, at, axis=1), compute_dtype(x, xp))
            for x, at in ((dense, index - missing), (out, index))
        )
        norms = [xp.sqrt(xp.sum(x * x, axis=(0, 1, 3))) for x in (given - exact, exact)]
        errors.append([float(error) for error in to_numpy(norms[0] / norms[1])])
    return errors
