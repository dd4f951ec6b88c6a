"""Plans from strangers, with attention in 8 bits: whatever a field holds, they are refused in words or run.

Memory is that of the tensors, whatever sizes a plan states, and so is time.
"""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rainfusion
from rainfusion import AttentionProblem, BlockMask, Plan, PlanFormatError, RainfusionError, TokenLayout, TopK

pytestmark = pytest.mark.filterwarnings("ignore::rainfusion.RainfusionWarning")

PROBLEM = AttentionProblem(2, 2, 96, 96, 16, "float32", 1)
PLANS = [
    rainfusion.plan(
        PROBLEM,
        TokenLayout((4, 4, 6), block=8),
        TopK(0.5),
        omitted=omitted,
        precision=precision,
        rotate=rotate,
        kv_lengths=lengths,
        returns=("%out", "%lse"),
    )
    for omitted, precision, rotate, lengths in (("summary", "int8", True, True), ("drop", "fp8", False, False))
]
RECORDS = [json.loads(plan.to_json()) for plan in PLANS]
LENGTHS = np.array([90, 96])
Q, K, V = (np.random.default_rng(7).standard_normal((2, heads, 96, 16), dtype=np.float32) for heads in (2, 1, 1))

FIELDS = [(n, at, field) for n, record in enumerate(RECORDS) for at, op in enumerate(record["ops"]) for field in op]
FIELDS += [
    (n, at, field)
    for n, record in enumerate(RECORDS)
    for at, op in enumerate(record["ops"])
    if op["op"].endswith(("quantise", "quantised"))
    for field in ("centre", "scale", "lengths", "y_centre", "y_scale", "surprise")
]
NAMES = sorted({*PLANS[0].types, *PLANS[1].types, "%nothing", "%", "q", "%a b"})
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 8, 96, 97, 2**20, 10**9, 2**31 - 1, 2**31, 10**12, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([*NAMES, "int8", "e4m3", "int4", "", "x" * 10**5]),
    st.lists(st.sampled_from([0, 1, 8, 96, 10**9, "x", None]), max_size=3),
    st.just({}),
)


def changed(n: int, at: int, field: str, value: Any) -> str:
    """The JSON of a plan with one field of one operation replaced or added."""
    record = json.loads(json.dumps(RECORDS[n]))
    record["ops"][at][field] = value
    return json.dumps(record)


@settings(max_examples=300, deadline=2000)
@given(st.sampled_from(FIELDS), ANYTHING)
def test_any_field_holds_anything(place, value):
    """Nothing but a RainfusionError comes out, and no more memory is taken than a fair plan takes."""
    said = None
    tracemalloc.start()
    try:
        plan = Plan.from_json(changed(*place, value))
        assert Plan.from_json(plan.to_json()) == plan
        lengths = {"kv_lengths": LENGTHS} if plan.takes("%kv_lengths") else {}
        rainfusion.lower(plan, backend="reference")(Q, K, V, **lengths)
    except RainfusionError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert said is None or 0 < len(said) < 2000
    assert peak < 2**25


TEXTS = [json.dumps(record) for record in RECORDS]


@settings(max_examples=300, deadline=2000)
@given(
    st.sampled_from(TEXTS), st.floats(0, 1), st.integers(0, 40), st.text(max_size=4) | st.sampled_from([*'[]{}",:%-9e'])
)
def test_any_characters_may_be_others(text, place, cut, put):
    """Text that is cut, or has something else in the middle, is refused as a plan or read as one."""
    at = round(place * len(text))
    with suppress(PlanFormatError):
        assert isinstance(Plan.from_json(text[:at] + put + text[at + cut :]), Plan)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tokens", 10**12, "tokens=1000000000000"),
        ("tokens", 0, "tokens=0"),
        ("block", 10**12, "block=1000000000000"),
        ("format", "int4", "format='int4'"),
        ("format", 8, "format=8"),
        ("by_channel", True, "one of block and by_channel"),
        ("by_channel", 1.5, "by_channel=1.5"),
        ("scale", "%vs", "with by_channel alone"),
        ("centre", "%nothing", "reads %nothing, which nothing before it makes"),
        ("centre", "%q", "one number a channel is"),
        ("order", "%mask", "an order of 96 tokens is int64"),
        ("lengths", "%order", "lengths of 2 samples are int32"),
        ("x", "%order", "reads [B, H, tokens, D]"),
        ("y", "%mask", "makes %mask a second time"),
        ("bits", 4, "has no field"),
    ],
)
def test_a_refusal_of_quantise_says_why(field, value, said):
    at = next(i for i, op in enumerate(RECORDS[1]["ops"]) if op["op"] == "quantise")
    with pytest.raises(PlanFormatError) as refused:
        Plan.from_json(changed(1, at, field, value))
    assert said in str(refused.value)


@pytest.mark.parametrize("value", ["yes", {}, [], 2, None])
def test_a_flag_is_a_truth_value(value):
    at = next(i for i, op in enumerate(RECORDS[1]["ops"]) if op["op"] == "attend_quantised")
    with pytest.raises(PlanFormatError, match=r"lengths_on_queries=.* is not a truth value"):
        Plan.from_json(changed(1, at, "lengths_on_queries", value))


@pytest.mark.parametrize("backend", ["reference", "torch", "openvino"])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_blocks_beyond_the_tokens_take_no_memory(backend, precision):
    """A single block of 2^31 - 1 tokens would take 256 GiB of padding."""
    layout = TokenLayout((4, 4, 6), block=128, window=(2, 8, 8))
    settings: dict[str, Any] = {"omitted": "summary", "kv_lengths": True, "precision": precision}
    fair = rainfusion.plan(PROBLEM, layout, rainfusion.Fixed(), returns=("%out", "%kb"), **settings)
    record = json.loads(fair.to_json())
    for op in record["ops"]:
        if op.get("block") is not None:
            op["block"] = [2**31 - 1] * 2 if isinstance(op["block"], list) else 2**31 - 1
    if backend != "reference":
        pytest.importorskip(backend)
    q, k, v = (Q, K, V) if backend == "reference" else map(torch.from_numpy, (Q, K, V))
    blocks = np.ones((2, 2, 1, 1), bool)
    mask = BlockMask(blocks if backend == "reference" else torch.from_numpy(blocks), 96, 96, (128, 128))
    results = [
        rainfusion.lower(plan, like=q, backend=backend)(q, k, v, mask=mask, kv_lengths=LENGTHS)
        for plan in (fair, Plan.from_json(json.dumps(record)))
    ]
    for right, got in zip(*results, strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(right))
