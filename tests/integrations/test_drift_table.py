"""Drift beside error: the rows of a run, and the limit of drift that follows from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rainfusion.core.arrays import to_numpy
from rainfusion.integrations.clock import Reading
from rainfusion.integrations.config import ConfigError
from rainfusion.integrations.drift_table import DriftProbe, DriftRow, drift_threshold
from tests.integrations.heads import GRID, Heads, changed, tensors


def row(drift, stale=1.0, fresh=1.0):
    return DriftRow("model", 0, 1, "", 0, 0, 1, drift, stale, fresh)


errors = st.floats(0, 4).map(lambda x: round(x, 1))
tables = st.lists(st.builds(row, st.integers(0, 6).map(float) | st.just(math.nan), errors, errors), min_size=1)


@given(tables, st.sampled_from([0.0, 0.1, 1.0]))
def test_the_threshold_is_the_largest_drift_whose_rows_lose_little(rows, extra):
    known = [one for one in rows if not math.isnan(one.drift)]
    if not known:
        with pytest.raises(ConfigError, match="there are no rows"):
            drift_threshold(rows, extra)
        return
    fitting = [0.0]
    for limit in {one.drift for one in known}:
        used = [one for one in known if one.drift <= limit]
        if sum(one.stale_error for one in used) <= (1 + extra) * sum(one.fresh_error for one in used) + 1e-9:
            fitting.append(limit)
    assert drift_threshold(rows, extra) == max(fitting)


def test_masks_that_lose_more_at_once_are_used_only_while_nothing_changes():
    assert drift_threshold([row(0.1, 2), row(0.2, 2)]) == 0.0
    assert drift_threshold([row(0.1, 2), row(0.2, 2)], extra=1) == 0.2


@pytest.mark.parametrize(
    ("rows", "extra", "message"),
    [
        ([], 0.1, "there are no rows; measure them with refresh_every above 1"),
        (["a row"], 0.1, "a row='a row' is a str; give a DriftRow"),
        ([row(0.1)], -1, "extra=-1 is below 0"),
        ([row(0.1)], "much", "extra='much' is not a finite number"),
        ([row(0.1, math.nan)], 0.1, "errors that are not finite"),
        ([row(0.1, 1, math.inf)], 0.1, "errors that are not finite"),
    ],
)
def test_what_gives_no_threshold_is_refused(rows, extra, message):
    with pytest.raises(ConfigError, match=message):
        drift_threshold(rows, extra)


def dense(q, k, v):
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(axis=-1, keepdims=True), v)


def observed(made, steps, prefix=0):
    """Rows, and whether the outputs are those of a run without a probe."""
    rows = []
    made.engine.probe = DriftProbe(made.config, "model", rows)
    for step, qkv in enumerate(steps):
        made.engine.begin(Reading(step=step), (GRID,))
        out = made.engine.attend(0, *qkv, lambda qkv=qkv: dense(*qkv)[:, prefix:])
        made.engine.end()
        always = made.attention(*qkv, sparsity=made.config.sparsity, **made.settings())
        np.testing.assert_array_equal(to_numpy(out), to_numpy(always))
    return rows


def test_rows_of_a_run(monkeypatch):
    made, qkv = Heads(monkeypatch, refresh_every=3), tensors()
    moved = changed(qkv, 1)
    rows = observed(made, [qkv, qkv, moved, moved, qkv])
    assert [(one.step, one.age, one.head) for one in rows] == [
        (step, age, head) for step, age in [(1, 1), (2, 2), (4, 1)] for head in range(4)
    ]
    for one in rows:
        if one.step == 1 or one.head != 1:
            assert one.drift == 0
            assert one.stale_error == one.fresh_error > 0
        else:
            assert one.drift > 1
            assert one.stale_error > one.fresh_error
    assert made.reused() == []
    assert 0 <= drift_threshold(rows, 0) < 1


def test_errors_are_relative_to_dense_attention(monkeypatch):
    """Where the sample is every unprotected token: two blocks of 64."""
    made, qkv = Heads(monkeypatch, refresh_every=2, block=64), tensors()
    moved = changed(qkv, 0, 1, 2, 3)
    rows = observed(made, [qkv, moved])
    mask = made.select(*qkv[:2], sparsity=0.5, **made.settings())
    out, exact = made.attention(*moved, mask=mask, **made.settings()), dense(*moved)
    norms = np.sqrt(((out - exact) ** 2).sum((0, 1, 3)) / (exact**2).sum((0, 1, 3)))
    np.testing.assert_allclose([one.stale_error for one in rows], norms, rtol=1e-4)


def test_a_host_may_leave_out_queries(monkeypatch):
    made = Heads(monkeypatch, refresh_every=2)
    assert len(observed(made, [tensors(), tensors(seed=1)], prefix=16)) == 4


def test_a_run_is_measured_by_itself(monkeypatch):
    made, rows = Heads(monkeypatch, refresh_every=3), []
    made.engine.probe = DriftProbe(made.config, "model", rows)
    for step in (0, 1, 0, 0):
        made.engine.begin(Reading(step=step), (GRID,))
        made.engine.attend(0, *tensors(), lambda: dense(*tensors()))
        made.engine.end()
    assert {(one.run, one.step) for one in rows} == {(0, 1)}
