"""The error of 8 bits: measured on small tensors, a page made from its record, and claims that follow from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # as a script finds its neighbours
import precision_error as measured
from generated import filled

del sys.path[0]

SETS = json.loads(measured.RECORD.read_text(encoding="utf-8"))["sets"]
ON_HOPPER = json.loads(measured.ON_HOPPER.read_text(encoding="utf-8"))["sets"]
CLIPS = [name for name in SETS if name.startswith("clip")]


def test_the_page_is_what_the_record_says():
    text = measured.PAGE.read_text(encoding="utf-8")
    assert filled(text, measured.tables({"sets": SETS}, {"sets": ON_HOPPER})) == text


def test_the_record_has_every_set_and_way():
    assert list(SETS) == list(measured.SETS)
    assert all(list(row["out"]) == list(row["lse"]) == list(measured.WAYS) for row in SETS.values())
    assert list(ON_HOPPER) == list(measured.SETS)
    assert all(list(row["out"]) == list(row["lse"]) == list(measured.KERNELS) for row in ON_HOPPER.values())


def test_hopper_is_nearly_as_exact_as_the_definition():
    for name, row in ON_HOPPER.items():
        for way, error in row["out"].items():
            assert error < (1.85 if name in CLIPS else 1.2) * SETS[name]["out"][way]


def test_claims_of_the_page_follow_from_the_record():
    errors = {name: row["out"] for name, row in SETS.items()}
    assert len(CLIPS) == 3
    assert all(0.006 < errors[name]["int8"] < 0.01 for name in CLIPS)
    assert all(0.006 < errors[name]["fp8"] < 0.009 for name in CLIPS)
    assert all(errors[name]["int8"] <= errors[name]["fp8"] for name in SETS)
    most = max(row["fp8"] / row["int8"] for row in errors.values())
    assert 3 < most < 4
    outliers = errors["3 channels of q and k times 10"]
    assert outliers["int8, rotated"] < 0.6 * outliers["int8"]
    assert outliers["fp8, rotated"] < 0.3 * outliers["fp8"]
    assert SETS["white noise, q and k times 3"]["largest_logit"] > 50


@pytest.mark.parametrize("name", ["white noise", "keys and values with a common part", "a sink block of small values"])
def test_small_tensors_are_measured(name, monkeypatch):
    monkeypatch.setattr(measured, "GRID", (2, 16, 16))
    found = measured.errors(measured.SETS[name](), (2, 16, 16))
    assert 0 < found["out"]["bf16"] < found["out"]["int8"] < 0.1
    assert found["lse"]["p and v alone"] < 1e-4 < found["lse"]["int8"] < found["lse"]["fp8"]


def test_bfloat16_is_rounded_to_nearest():
    x = np.array([1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8], np.float32)
    np.testing.assert_array_equal(measured.bfloat16(x), [1.0, 1.0, 1 + 2.0**-6])
