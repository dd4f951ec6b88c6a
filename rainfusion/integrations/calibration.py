"""A calibration: what skipping blocks costs in every head of a model, and the budgets that follow from it.

The error of every head's attention output is measured once, at several shares; a budget for any mean share is then
solved in a moment. That heads differ, and that their error can guide a budget for each, is the idea of HASTE (arXiv
2605.14513), of which only the abstract is public: table, weights and solver are ours.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from rainfusion.core.checks import as_int, as_number, as_share, shown
from rainfusion.core.files import IrregularFileError, as_path, read_regular
from rainfusion.integrations.budgets import shares_of_heads
from rainfusion.integrations.head_budgets import (
    Binding,
    CalibrationError,
    HeadBudgets,
    ModelBudgets,
    as_list,
    as_text,
    named_records,
    record_as,
    set_field,
)

if TYPE_CHECKING:
    from rich.table import Table

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_FORMAT, _VERSION = "rainfusion calibration", 1
_MOST_BYTES = 2**24  # 80 layers of 128 heads at 16 shares take 4 MB
_MOST_SHARES = 32
_MOST_ERROR = 1e30  # so that weights, errors and their sums stay finite

HeadShares = tuple[tuple[float, ...], ...]
"""Shares to skip, ``[layers][heads]``."""


@dataclass(frozen=True)
class Checked:
    """The squared error of a model's output, relative to its squared norm, as it was measured.

    Args:
        uniform: with one share for all heads.
        budgets: with the budgets that were solved for the same mean share.
        sparsity, ranks: the mean share, and the devices that carry equal work.
        forwards: how many were run.

    Raises:
        CalibrationError: errors that are negative or not finite.
    """

    uniform: float
    budgets: float
    sparsity: float
    ranks: int
    forwards: int

    def __post_init__(self) -> None:
        for name in ("uniform", "budgets"):
            set_field(self, name, _not_negative(getattr(self, name), name))
        set_field(self, "sparsity", as_share(self.sparsity, "sparsity", CalibrationError, top=False))
        for name in ("ranks", "forwards"):
            set_field(self, name, as_int(getattr(self, name), name, CalibrationError))


@dataclass(frozen=True)
class ErrorTable:
    """What skipping blocks costs in every head of one model.

    Args:
        name: of the model in its pipeline.
        shares: of block pairs skipped, ascending, in (0, 1), ``[shares]``.
        errors: squared error of a head's attention output over the squared norm of its layer's output, both summed over
            what was measured: ``[layers][heads][shares]``. None for a layer that was always dense.
        weights: how much of a layer's error reaches the model's output: the squared relative error of that over the
            layer's, ``[layers]``; 1 where it was not measured.
        calls: attention calls that were measured.
        checked: the model's output under the budgets, where it was measured.

    Raises:
        CalibrationError: a value of another kind, number or range.
    """

    name: str
    binding: Binding
    shares: tuple[float, ...]
    errors: tuple[HeadShares | None, ...]
    weights: tuple[float, ...]
    calls: int
    checked: Checked | None = None

    def __post_init__(self) -> None:
        as_text(self.name, "name")
        if not isinstance(self.binding, Binding):
            set_field(self, "binding", record_as(Binding, self.binding, "binding"))
        set_field(self, "shares", ascending(self.shares))
        layers = self.binding.layers
        errors = tuple(self._layer_errors(layer) for layer in as_list(self.errors, "errors", layers, layers))
        if not any(errors):
            raise CalibrationError(f"no layer of {self.name} was measured")
        set_field(self, "errors", errors)
        weights = as_list(self.weights, "weights", layers, layers)
        set_field(self, "weights", tuple(_not_negative(weight, "weights") for weight in weights))
        set_field(self, "calls", as_int(self.calls, "calls", CalibrationError))
        if not isinstance(self.checked, Checked | None):
            set_field(self, "checked", record_as(Checked, self.checked, "checked"))

    def _layer_errors(self, layer: Any) -> HeadShares | None:
        if layer is None:
            return None
        heads, shares = self.binding.heads, len(self.shares)
        return tuple(
            tuple(_not_negative(error, "errors") for error in as_list(head, "errors", shares, shares))
            for head in as_list(layer, "errors", heads, heads)
        )

    def uniform(self, sparsity: float) -> HeadShares:
        """One share for all heads of layers that were measured."""
        return tuple((0.0 if layer is None else sparsity,) * self.binding.heads for layer in self.errors)

    def budget(self, sparsity: float, ranks: int) -> ModelBudgets:
        """The budgets whose mean share, over the layers that were measured, is `sparsity`, of the least error.

        Raises:
            CalibrationError: a share beyond what was measured, or ranks that do not divide the heads.
        """
        if sparsity > self.shares[-1]:
            raise CalibrationError(
                f"sparsity={sparsity:g} of {self.name} is more than {self.shares[-1]:g}, the largest share that was "
                "measured; ask for less, or calibrate with a larger share and, where protection takes too much, "
                "another sink"
            )
        heads = self.binding.heads
        if heads % ranks:
            raise CalibrationError(f"ranks={ranks} does not divide the {heads} heads of {self.name}")
        points, measured = (0.0, *self.shares), [i for i, layer in enumerate(self.errors) if layer is not None]
        solved = np.zeros((self.binding.layers, heads))
        solved[measured] = shares_of_heads(self._weighted()[measured], points, sparsity, ranks)
        return ModelBudgets(self.name, self.binding, tuple(map(tuple, solved.tolist())))

    def predicted(self, shares: HeadShares) -> float:
        """The squared relative error of the model's output that the table predicts, as if layers' errors added up.

        Where weights were not measured, it is the sum of the layers' own errors.

        Args:
            shares: to skip, ``[layers][heads]``.
        """
        points, weighted = (0.0, *self.shares), self._weighted()
        return float(
            sum(
                np.interp(share, points, weighted[layer, head])
                for layer, heads in enumerate(shares)
                for head, share in enumerate(heads)
            )
        )

    def _weighted(self) -> np.ndarray:
        """Errors times weights, ``[layers, heads, 1 + shares]``: nothing skipped costs nothing."""
        table = np.zeros((self.binding.layers, self.binding.heads, 1 + len(self.shares)))
        for layer, (errors, weight) in enumerate(zip(self.errors, self.weights, strict=True)):
            if errors is not None:
                table[layer, :, 1:] = weight * np.array(errors)
        return table


@dataclass(frozen=True)
class Calibration:
    """What skipping blocks costs in every head of a pipeline's models; a value for `RainFusionConfig.sparsity`.

    Args:
        tables: one a model.
        sparsity, ranks: of the budgets that a configuration takes from it; `budget` solves for others.
        prompts: how many it was measured with.

    Raises:
        CalibrationError: a value of another kind or range.
    """

    tables: tuple[ErrorTable, ...]
    sparsity: float
    ranks: int = 1
    prompts: int = 1

    def __post_init__(self) -> None:
        set_field(self, "tables", named_records(ErrorTable, self.tables, "tables"))
        set_field(self, "sparsity", as_share(self.sparsity, "sparsity", CalibrationError, top=False))
        for name in ("ranks", "prompts"):
            set_field(self, name, as_int(getattr(self, name), name, CalibrationError))

    def budget(self, sparsity: float | None = None, ranks: int | None = None) -> HeadBudgets:
        """A share for every head, of the least error that the table predicts; nothing is measured again.

        Args:
            sparsity: mean share of block pairs to skip in every model; default: the calibration's own.
            ranks: devices that each hold consecutive heads of every layer, as Ulysses splits them: all carry equal
                work. Default: the calibration's own.

        Raises:
            CalibrationError: a share beyond what was measured, or ranks that do not divide the heads.
        """
        share = self.sparsity if sparsity is None else as_share(sparsity, "sparsity", CalibrationError, top=False)
        ranks = self.ranks if ranks is None else as_int(ranks, "ranks", CalibrationError)
        return HeadBudgets(tuple(table.budget(share, ranks) for table in self.tables), share, ranks)

    def to_json(self) -> str:
        """The calibration as one JSON object."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str | bytes) -> Calibration:
        """The calibration that `to_json` wrote; nothing in it is trusted.

        Raises:
            CalibrationError: anything else, or of a later version.
        """
        try:
            record = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise CalibrationError(f"this is not JSON: {str(error)[:200]}") from None
        calibration: Calibration = record_as(cls, _fields_of(record), "the calibration")
        return calibration

    def save(self, path: str | PathLike[str]) -> None:
        """Write the calibration to a file, as JSON.

        Raises:
            CalibrationError: no path.
            OSError: the file cannot be written.
        """
        try:
            as_path(path).write_text(self.to_json(), encoding="utf-8")
        except IrregularFileError as error:
            raise CalibrationError(str(error)) from None

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """The calibration in a file that `save` wrote; nothing in it is trusted.

        Raises:
            CalibrationError: not a regular file, too large, or no calibration.
            OSError: no such file, or it may not be read.
        """
        try:
            return cls.from_json(read_regular(path, _MOST_BYTES))
        except (IrregularFileError, CalibrationError) as error:
            raise CalibrationError(
                f"{shown(str(path))} is not a calibration ({str(error)[:300]}); write one with Calibration.save"
            ) from None

    def summary(self) -> dict[str, Any]:
        """What was measured, predicted and checked of every model, as plain JSON values."""
        budgets = self.budget()
        models = {
            table.name: {
                "layers": table.binding.layers,
                "heads": table.binding.heads,
                "grids": list(table.binding.grids),
                "calls": table.calls,
                "predicted": {
                    "uniform": table.predicted(table.uniform(self.sparsity)),
                    "budgets": table.predicted(own.shares),
                },
                "checked": None if table.checked is None else asdict(table.checked),
            }
            for table, own in zip(self.tables, budgets.models, strict=True)
        }
        return {"sparsity": self.sparsity, "ranks": self.ranks, "prompts": self.prompts, "models": models}

    def said(self) -> str:
        """In words, what was measured and checked of every model, a line each."""
        return "\n".join(_said(table) for table in self.tables)

    def table(self, sparsity: float | None = None, ranks: int | None = None) -> Table:
        """Budgets and predicted errors by layer, as a `rich.table.Table`. Arguments as for `budget`."""
        from rich.markup import escape
        from rich.table import Table

        budgets = self.budget(sparsity, ranks)
        title = f"mean share {budgets.sparsity:g}, {budgets.ranks} rank{'s' * (budgets.ranks > 1)}"
        shown_table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        columns = ("mean share", "least", "most", "weight", "error, one share", "error, budgets")
        for name in ("model", "layer", *columns):
            shown_table.add_column(name, justify="left" if name == "model" else "right")
        for model, one in zip(budgets.models, self.tables, strict=True):
            for layer, cells in enumerate(_layer_rows(one, model, budgets.sparsity)):
                shown_table.add_row(escape(model.name) if layer == 0 else "", str(layer), *cells)
        return shown_table


def _said(table: ErrorTable) -> str:
    found, grids = table.checked, ", ".join(table.binding.grids)
    measured = f"{table.name}: {table.calls} attention calls of {table.binding.model} measured on {grids or 'no grid'}"
    if found is None:
        return f"{measured}; the model's output was not checked"
    ratio = f", {found.budgets / found.uniform:.3f} times" if found.uniform else ""
    return (
        f"{measured}; squared relative error of its output at a mean share of {found.sparsity:g}, {found.forwards} "
        f"forwards: {found.uniform:.3g} with one share, {found.budgets:.3g} with budgets{ratio}"
    )


def _layer_rows(table: ErrorTable, budgets: ModelBudgets, sparsity: float) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    points, weighted = (0.0, *table.shares), table._weighted()
    for errors, shares, curves, weight in zip(table.errors, budgets.shares, weighted, table.weights, strict=True):
        if errors is None:
            rows.append(("dense", "", "", "", "", ""))
            continue
        one, own = (
            sum(np.interp(share, points, curve) for share, curve in zip(given, curves, strict=True))
            for given in ((sparsity,) * len(shares), shares)
        )
        figures = (sum(shares) / len(shares), min(shares), max(shares))
        rows.append((*(f"{figure:.3f}" for figure in figures), f"{weight:.3g}", f"{one:.3g}", f"{own:.3g}"))
    return rows


def ascending(shares: Any) -> tuple[float, ...]:
    """Shares to measure at, checked."""
    listed = as_list(shares, "shares", _MOST_SHARES, 1)
    checked = tuple(as_share(share, "shares", CalibrationError, top=False) for share in listed)
    if checked[0] == 0 or any(a >= b for a, b in pairwise(checked)):
        raise CalibrationError(f"shares={shown(shares)} do not ascend from above 0; give {SHARES}, for example")
    return checked


def _fields_of(record: Any) -> dict[str, Any]:
    """The fields of a calibration's JSON object, without its format and version."""
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise CalibrationError("it does not say that it is a calibration")
    version = record.get("version")
    if type(version) is not int or not 1 <= version <= _VERSION:
        raise CalibrationError(f"calibration format {shown(version)}; this rainfusion reads 1 to {_VERSION}")
    return {name: value for name, value in record.items() if name not in ("format", "version")}


def _not_negative(value: Any, name: str) -> float:
    allowed = f"a number from 0 to {_MOST_ERROR:g}"
    number = as_number(value, name, CalibrationError, allowed)
    if not 0 <= number <= _MOST_ERROR:
        raise CalibrationError(f"{name}={shown(value)} is out of range; give {allowed}")
    return number
