"""What happened in a run: every attention call as a row, and the rows as a table, as JSON and as a picture."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

from rainfusion.core.checks import as_int, as_number, as_share, one_of, shown
from rainfusion.core.errors import RainfusionError
from rainfusion.integrations.config import RainFusionConfig

if TYPE_CHECKING:
    from rich.table import Table

SPARSE, REUSED, DENSE, SKIPPED = "sparse", "reused", "dense", "skipped"


class ReportFormatError(RainfusionError, ValueError):
    """Text that is no report, or a column that reports do not have."""


class Row(NamedTuple):
    """One layer of one forward.

    Attributes:
        model: name of the model in its pipeline.
        run, step, context, layer: where it happened; runs, steps and layers from 0.
        kind: ``"sparse"``; ``"reused"``, sparse by masks of an earlier call, in some heads at least; ``"dense"``;
            ``"skipped"`` where the host did not call the layer, as caches do.
        why: in words, what made it dense.
        density: share of block pairs attended; None where only the data can tell.
        ms: milliseconds of the call, where they were asked for.
        reused: share of the heads that used the mask of an earlier call.
    """

    model: str
    run: int
    step: int
    context: str
    layer: int
    kind: str
    why: str = ""
    density: float | None = None
    ms: float | None = None
    reused: float = 0.0


class Log:
    """The newest rows, at most `limit`; times are read when the rows are."""

    def __init__(self, limit: int) -> None:
        self._limit, self._rows, self.lost = limit, [], 0  # type: tuple[int, list[tuple[Row, Callable[[], float] | None]], int]

    def add(self, row: Row, read_ms: Callable[[], float] | None = None) -> None:
        """Keep a row; `read_ms` may wait for the device."""
        self._rows.append((row, read_ms))
        if len(self._rows) > self._limit + self._limit // 8:  # not one by one, which would move all rows each time
            self._cut()

    def rows(self) -> tuple[Row, ...]:
        """The rows that are kept, oldest first."""
        self._cut()
        return tuple(row if read is None else row._replace(ms=read()) for row, read in self._rows)

    def _cut(self) -> None:
        excess = max(len(self._rows) - self._limit, 0)
        del self._rows[:excess]
        self.lost += excess


@dataclass(frozen=True)
class Report:
    """What happened since rainfusion was applied to a pipeline.

    Attributes:
        config: the configuration that was followed.
        layers: self-attention layers of every model, by name.
        rows: oldest first.
        lost: older rows that were not kept (`RainFusionConfig.report_rows`).
    """

    config: RainFusionConfig
    layers: dict[str, int]
    rows: tuple[Row, ...]
    lost: int = 0

    @property
    def density(self) -> float | None:
        """Share of block pairs attended over all calls that were made; None where there were none, or none is known."""
        known = [row.density for row in self.rows if row.density is not None and row.kind != SKIPPED]
        return sum(known) / len(known) if known else None

    @property
    def reused(self) -> float | None:
        """Share of the heads' masks that were used again, over all sparse calls; None where there were none."""
        return _mean_reused(self.rows)

    def count(self, **where: Any) -> int:
        """How many rows there are, such as ``report.count(kind="sparse", step=3)``.

        Raises:
            ReportFormatError: rows have no column of that name.
        """
        for name in where:
            one_of(name, Row._fields, "column", ReportFormatError)
        return sum(all(getattr(row, name) == value for name, value in where.items()) for row in self.rows)

    def to_json(self) -> str:
        """The report as one JSON object."""
        record = {
            "config": json.loads(self.config.to_json()),
            "layers": self.layers,
            "lost": self.lost,
            "columns": list(Row._fields),
            "rows": [list(row) for row in self.rows],
        }
        return json.dumps(record)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote; nothing in it is trusted.

        Raises:
            ReportFormatError: anything else.
        """
        try:
            record = json.loads(text)
            layers = {_text(model): _count(number) for model, number in record["layers"].items()}
            rows = tuple(_row(dict(zip(record["columns"], row, strict=True)), layers) for row in record["rows"])
            config = RainFusionConfig.from_json(json.dumps(record["config"]))
            return cls(config, layers, rows, _count(record["lost"]))
        except (RainfusionError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            said = f"{type(error).__name__}: {error}"[:300]
            raise ReportFormatError(f"not a report of Report.to_json ({said}); write one with it") from error

    def table(self) -> Table:
        """The rows by model, context and step, as a `rich.table.Table`."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self._title(), title_justify="left", box=None, pad_edge=False)
        timed, reuses = any(row.ms is not None for row in self.rows), bool(self.reused)
        more = [*(["reused"] * reuses), *(["ms"] * timed)]
        for name in ("model", "run", "context", "steps", "layers", "density", "why dense", *more):
            table.add_column(name, justify="right" if name in ("density", *more) else "left")
        for group in _alike(self.rows):
            rows = [row for of_step in group.steps.values() for row in of_step]
            reused, ms = _mean_reused(rows), sum(row.ms or 0 for row in rows) / len(group.steps)
            share = "" if reused is None else f"{reused:.0%}"
            table.add_row(*map(escape, group.cells()), *([share] * reuses), *([f"{ms:.2f}"] * timed))
        return table

    def _title(self) -> str:
        if not self.rows:
            return "no forward since rainfusion was applied"
        kinds = Counter(row.kind for row in self.rows)
        said = ", ".join(f"{kinds[kind]} {kind}" for kind in (SPARSE, REUSED, DENSE, SKIPPED) if kinds[kind])
        density = "" if self.density is None else f"; density {self.density:.3f}"
        reused = f"; {self.reused:.0%} of the heads' masks used again" if self.reused else ""
        return f"{len(self.rows)} attention calls: {said}{density}{reused}" + (
            f"; {self.lost} older not kept" if self.lost else ""
        )

    def __str__(self) -> str:
        try:
            from rich.console import Console
        except ImportError:
            return self._title() + "; install rich for the table"
        table, text = self.table(), io.StringIO()
        table.title = None  # rich would break it at the width of the rows
        Console(file=text, width=120).print(table)
        return "\n".join([self._title(), *(line.rstrip() for line in text.getvalue().splitlines())]).rstrip()

    def heatmap(self, path: str | PathLike[str]) -> None:
        """Density by step and layer of the last run, a panel a model and context (at most 8), as a PNG.

        Raises:
            PictureError: matplotlib is not installed, or the file cannot be written.
        """
        from rainfusion.integrations.heatmap import draw

        draw(self, path)


def _mean_reused(rows: Iterable[Row]) -> float | None:
    shares = [row.reused for row in rows if row.kind in (SPARSE, REUSED)]
    return sum(shares) / len(shares) if shares else None


def _row(record: dict[str, Any], layers: dict[str, int]) -> Row:
    """A row of a file, checked: what draws and counts rows reads them as they are."""
    row = Row(**record)
    for words in (row.model, row.context, row.kind, row.why):
        _text(words)
    for number in (row.run, row.step, row.layer):
        _count(number)
    if row.layer >= layers[row.model]:
        raise ValueError(f"a row of layer {row.layer}; {shown(row.model)} has {layers[row.model]}")
    density = None if row.density is None else as_share(row.density, "density", ReportFormatError, top=True)
    ms = None if row.ms is None else as_number(row.ms, "ms", ReportFormatError, "milliseconds")
    reused = as_share(row.reused, "reused", ReportFormatError, top=True)
    return row._replace(density=density, ms=ms, reused=reused)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is no text")
    return value


def _count(value: Any) -> int:
    return as_int(value, "a count", ReportFormatError, minimum=0)


@dataclass
class _Group:
    """Consecutive steps in which the same happened to the same layers."""

    key: tuple[str, int, str]
    steps: dict[int, list[Row]]

    def cells(self) -> list[str]:
        model, run, context = self.key
        rows = next(iter(self.steps.values()))
        by_kind = Counter((row.kind, row.why) for row in rows)
        layers = ", ".join(f"{count} {kind}" for kind, count in Counter(row.kind for row in rows).items())
        why = ", ".join(dict.fromkeys(reason for (_, reason) in by_kind if reason))
        known = [row.density for row in rows if row.density is not None]
        density = f"{sum(known) / len(known):.3f}" if known else ""
        return [model, str(run), context, _range(self.steps), layers, density, why]


def _alike(rows: Iterable[Row]) -> list[_Group]:
    """The rows by model, run and context, equal consecutive steps put together."""
    steps: dict[tuple[str, int, str], dict[int, list[Row]]] = {}
    for row in rows:
        steps.setdefault((row.model, row.run, row.context), {}).setdefault(row.step, []).append(row)
    groups: list[_Group] = []
    for key, by_step in steps.items():
        last, previous = None, -1
        for step, of_step in by_step.items():
            what = [(row.layer, row.kind, row.why, row.density) for row in of_step]
            if last != what or step != previous + 1:
                groups.append(_Group(key, {}))
            groups[-1].steps[step] = of_step
            last, previous = what, step
    return groups


def _range(steps: Iterable[int]) -> str:
    numbers = list(steps)
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
