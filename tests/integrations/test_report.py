"""The report: rows that are kept, the table, JSON both ways, the picture."""

from __future__ import annotations

import json
import sys
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rainfusion.core.errors import RainfusionError
from rainfusion.demo.style import PictureError
from rainfusion.integrations.config import RainFusionConfig
from rainfusion.integrations.report import Log, Report, ReportFormatError, Row


def rows(model="transformer", runs=1, steps=3, layers=2, contexts=("cond", "uncond"), ms=None):
    return tuple(
        Row(model, run, step, context, layer, *what(step, layer), ms)
        for run in range(runs)
        for step in range(steps)
        for context in contexts
        for layer in range(layers)
    )


def what(step, layer):
    if step == 0:
        return "dense", "first steps", 1.0
    return ("skipped", "not called", None) if layer == 1 and step == 2 else ("sparse", "", 0.25)


def report(given=None, **layers):
    return Report(
        RainFusionConfig(dense_steps=(1, 0)), layers or {"transformer": 2}, rows() if given is None else given
    )


def test_the_newest_rows_are_kept():
    log = Log(8)
    for step in range(30):
        log.add(Row("model", 0, step, "", 0, "sparse"))
        assert len(log._rows) <= 9
    assert [row.step for row in log.rows()] == [*range(22, 30)]
    assert log.lost == 22
    none = Log(0)
    none.add(Row("model", 0, 0, "", 0, "sparse"))
    assert (none.rows(), none.lost) == ((), 1)


def test_times_are_read_when_the_rows_are():
    read = []
    log = Log(8)
    log.add(Row("model", 0, 0, "", 0, "sparse"), lambda: read.append(1) or 2.5)
    assert not read
    assert log.rows()[0].ms == 2.5


def test_density_and_counts():
    made = report()
    assert made.count() == 12
    assert made.count(kind="dense") == 4
    assert made.count(kind="sparse", context="cond", layer=1) == 1
    assert made.density == pytest.approx((4 + 6 * 0.25) / 10)
    assert report(()).density is None
    assert report((Row("transformer", 0, 0, "", 0, "skipped", "not called", 1.0),)).density is None
    with pytest.raises(ReportFormatError, match="column='colour' is not known"):
        made.count(colour="red")


@pytest.mark.parametrize("ms", [None, 1.5])
def test_json_both_ways(ms):
    made = Report(RainFusionConfig(sparsity={0: (0.5, 0.25)}), {"transformer": 2}, rows(ms=ms), lost=7)
    assert Report.from_json(made.to_json()) == made


def test_reports_without_the_share_that_was_used_again_are_read():
    record = json.loads(report().to_json())
    record["columns"].remove("reused")
    record["rows"] = [row[:-1] for row in record["rows"]]
    assert Report.from_json(json.dumps(record)) == report()
    record["columns"].append("reused")
    record["rows"] = [[*row, 1.5] for row in record["rows"]]
    with pytest.raises(ReportFormatError, match=r"reused=1\.5 is out of range"):
        Report.from_json(json.dumps(record))


def test_the_share_of_masks_used_again_is_of_sparse_calls():
    made = report((*rows(), Row("transformer", 0, 3, "cond", 0, "reused", reused=0.7)))
    assert made.reused == pytest.approx(0.7 / 7)
    assert report().reused == 0
    assert report(rows(steps=1)).reused is None
    assert "10% of the heads' masks used again" in str(made)
    assert "reused" not in str(report())


def test_the_table_puts_equal_steps_together():
    """One run of two models, which the second of them ends."""
    lines = str(report(rows(steps=2) + rows("transformer_2", steps=6, contexts=[""])[4:])).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "16 attention calls: 11 sparse, 4 dense, 1 skipped; density 0.450",
        "model run context steps layers density why dense",
        "transformer 0 cond 0 2 dense 1.000 first steps",
        "transformer 0 cond 1 2 sparse 0.250",
        "transformer 0 uncond 0 2 dense 1.000 first steps",
        "transformer 0 uncond 1 2 sparse 0.250",
        "transformer_2 0 2 1 sparse, 1 skipped 0.250 not called",
        "transformer_2 0 3 to 5 2 sparse 0.250",
    ]


def test_the_table_fits_its_width_and_has_times_where_there_are_some():
    timed = str(report(rows(ms=2.0)))
    assert "ms" in timed.splitlines()[1]
    assert "4.00" in timed
    assert "ms" not in str(report()).splitlines()[1].split()
    reasons = tuple(
        Row("transformer", 0, 0, "cond", layer, "dense", f"small: backend {layer} estimates 0.50 times dense", 1.0)
        for layer in range(9)
    )
    assert all(len(line) <= 120 for line in str(report(reasons)).splitlines())


def test_a_report_of_nothing_says_so():
    assert "no forward since rainfusion was applied" in str(report(()))


def test_lost_rows_are_said():
    made = Report(RainFusionConfig(), {"transformer": 2}, rows(), lost=5)
    assert "5 older not kept" in str(made)


def test_without_rich_one_line_is_left(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert str(report()) == (
        "12 attention calls: 6 sparse, 4 dense, 2 skipped; density 0.550; install rich for the table"
    )


@pytest.mark.parametrize(
    "made",
    [
        report(),
        report(()),
        report(rows(runs=2) + rows("transformer_2", runs=2), transformer=2, transformer_2=2),
        report(rows(contexts=[f"context {n}" for n in range(12)])),
        report((Row("transformer", 0, 0, "", 1, "sparse"),)),
    ],
    ids=["one run", "nothing", "two models, two runs", "many contexts", "density unknown"],
)
def test_the_heat_map_is_a_png(made, tmp_path):
    pytest.importorskip("matplotlib")
    made.heatmap(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=9,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_text_that_is_no_report_is_refused_or_read_whole(data):
    """A value somewhere in a report becomes another; what is read is written and counted as any report."""
    record = json.loads(report().to_json())
    at = record
    for _ in range(data.draw(st.integers(0, 3))):
        keys = [*at] if isinstance(at, dict) else [*range(len(at))]
        key = data.draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or not at[key]:
            break
        at = at[key]
    at[data.draw(st.sampled_from([*at] if isinstance(at, dict) else [*range(len(at))]))] = data.draw(JUNK)
    with suppress(ReportFormatError):
        read = Report.from_json(json.dumps(record))
        assert Report.from_json(read.to_json()) == read
        assert read.count(kind="sparse") <= len(read.rows)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*json.loads(RainFusionConfig().to_json())]), JUNK, max_size=2))
def test_values_that_are_no_configuration_are_refused(record):
    with suppress(RainfusionError):
        RainFusionConfig.from_json(json.dumps(record))


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", "[" * 100_000, '{"sparsity": ' + "9" * 5000 + "}", None, b"\xff"]
)
def test_text_that_is_neither(text):
    with pytest.raises(ReportFormatError, match="not a report"):
        Report.from_json(text)
    if text not in ("{}",):
        with pytest.raises(RainfusionError):
            RainFusionConfig.from_json(text)


def test_a_heat_map_that_no_screen_shows_is_refused(tmp_path):
    made = report((Row("model", 0, 2**30, "", 0, "sparse", "", 1.0),), model=2**30)
    with pytest.raises(PictureError, match="bytes"):
        made.heatmap(tmp_path / "map.png")
