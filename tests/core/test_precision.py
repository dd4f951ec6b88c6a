"""Attention in 8 bits: rounding against torch's dtypes, the definitions against a plain emulation, and the passes."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from array_api_compat import array_namespace
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import rainfusion
from rainfusion import AttentionProblem, BlockMask, Fixed, Plan, TokenLayout, TopK, TopP, lower, passes, plan
from rainfusion.core import ops
from rainfusion.core.errors import PlanFormatError, ProblemError, SparsityWarning, SpeedWarning
from rainfusion.core.ops.rounding import hadamard, to_e4m3

PRECISIONS = ("int8", "fp8")
GRID = (2, 6, 5)
TEXT = 9
TOKENS = math.prod(GRID) + TEXT


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsityWarning)
        return plan(*args, **kwargs)


def e4m3(x):
    """To float8_e4m3fn and back by torch, saturating; float64 in float64 steps of the same numbers."""
    return torch.from_numpy(np.clip(x, -448, 448).astype(np.float32)).to(torch.float8_e4m3fn).float().numpy()


def relative(actual, expected):
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


# -- rounding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_e4m3_is_torchs_for_a_sample_of_all_bit_patterns_and_every_half(library):
    patterns = torch.arange(-(2**31), 2**31, 65521, dtype=torch.int64).to(torch.int32).view(torch.float32)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    halves = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(halves, torch.full_like(halves, to)) for to in (1e9, -1e9)]
    x = torch.cat([patterns[patterns.isfinite()], numbers, halves, *beside])
    given = x if library == "torch" else x.numpy()
    np.testing.assert_array_equal(np.asarray(to_e4m3(given, array_namespace(given))), e4m3(x.numpy()))


@given(arrays.arrays(np.float32, 64, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_e4m3_is_torchs_for_any_finite_number(x):
    np.testing.assert_array_equal(to_e4m3(x, array_namespace(x)), e4m3(x))


@given(st.floats(2**-12, 500), st.sampled_from([np.float32, np.float64]))
def test_e4m3_is_the_nearest_of_its_numbers(value, dtype):
    x = np.array([value], dtype)
    numbers = np.unique(np.abs(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()))
    away = np.abs(numbers.astype(np.float64) - float(x[0])).min()
    assert abs(float(to_e4m3(x, array_namespace(x))[0]) - float(x[0])) == away


def test_e4m3_keeps_nan_and_saturates():
    x = np.array([np.nan, np.inf, -np.inf, 1e30])
    np.testing.assert_array_equal(to_e4m3(x, array_namespace(x)), [np.nan, 448, -448, 448])


@pytest.mark.parametrize("dim", [1, 2, 64, 128])
def test_the_hadamard_transform_is_its_own_inverse_and_keeps_products(dim, rng):
    x, y = rng.standard_normal((2, 5, dim))
    xp = array_namespace(x)
    np.testing.assert_allclose(hadamard(hadamard(x, xp), xp), x, atol=1e-12)
    np.testing.assert_allclose(hadamard(x, xp) @ hadamard(y, xp).T, x @ y.T, atol=1e-12)
    np.testing.assert_allclose(np.abs(hadamard(np.eye(dim), xp)), dim**-0.5)


# -- quantise ----------------------------------------------------------------------------------------


def plainly(x, order, length, *, format, block, centred, rotated, by_channel):
    """What `quantise` means for one head ``[tokens, D]``, token by token in float64."""
    tokens = np.asarray(x, np.float64)[order][:length]
    centre = tokens.mean(axis=0) if centred and length else np.zeros(x.shape[1])
    turn = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(x.shape[1])] for i in range(x.shape[1])])
    moved = tokens - centre
    moved = moved @ turn / x.shape[1] ** 0.5 if rotated else moved
    top = {"int8": 127, "e4m3": 448}[format]
    y = np.zeros_like(np.asarray(x, np.float64))
    groups = [(slice(None), [c]) for c in range(x.shape[1])] if by_channel else []
    groups = groups or [(slice(i, i + block), slice(None)) for i in range(0, length, block)]
    for group in groups:
        scale = (np.abs(moved[group]).max(initial=0) / top) or 1.0
        ratio = moved[group] / scale
        moved[group] = scale * (np.round(ratio) if format == "int8" else e4m3(ratio))
    moved = moved @ turn / x.shape[1] ** 0.5 if rotated else moved
    y[np.asarray(order)[:length]] = moved + centre
    return y


@settings(max_examples=80)
@given(st.data())
def test_quantise_is_the_plain_emulation(data):
    """Every attribute and operand together; a half rounds either way where float32 and float64 disagree."""
    tokens, dim = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 4, 8]))
    by_channel = data.draw(st.booleans())
    own = {
        "format": data.draw(st.sampled_from(["int8", "e4m3"])),
        "block": None if by_channel else data.draw(st.sampled_from([1, 8, 16])),
        "centred": data.draw(st.booleans()),
        "rotated": data.draw(st.booleans()),
    }
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = (rng.standard_normal((2, 3, tokens, dim)) * 3 + 2).astype(data.draw(st.sampled_from(["float32", "float64"])))
    order = rng.permutation(tokens) if data.draw(st.booleans()) else None
    lengths = np.array([tokens, data.draw(st.integers(0, tokens))]) if data.draw(st.booleans()) else None
    y, centre, scale = ops.quantise(x, order, lengths, **own)
    op = ops.Quantise(x="%x", y="%y", y_centre="%c", y_scale="%s", by_channel=by_channel, **own)
    kinds = op.infer({"x": ops.ValueType(x.shape, x.dtype.name)})
    assert [(v.shape, v.dtype.name) for v in (y, centre, scale)] == [kinds[f] for f in ("y", "y_centre", "y_scale")]
    steps = []
    for b, h in itertools.product(range(2), range(3)):
        length = tokens if lengths is None else int(lengths[b])
        walked = np.arange(tokens) if order is None else order
        expected = plainly(x[b, h], walked, length, by_channel=by_channel, **own)
        steps.append(np.abs(y[b, h] - expected) > 1e-4)
    assert np.mean(steps) < 0.02  # nearly all agree, and the rest is one step of the format off
    np.testing.assert_allclose(y, np.where(y == 0, 0, x), atol=np.abs(x).max() * 0.2)


def test_quantise_takes_a_centre_and_scale_from_elsewhere(rng):
    x = rng.standard_normal((1, 2, 30, 8)).astype(np.float32) + 5
    _, centre, scale = ops.quantise(x, format="e4m3", centred=True)
    means = x.reshape(1, 2, 5, 6, 8).mean(axis=3)
    y8, same, scales = ops.quantise(means, None, None, centre, scale, format="e4m3")
    assert same is centre
    assert scales is scale
    expected = centre[:, :, None] + e4m3((means - centre[:, :, None]) / scale[:, :, None]) * scale[:, :, None]
    np.testing.assert_array_equal(y8, expected)


def test_lengths_count_in_tokens_where_rows_are_means():
    """A block without a token, whose mean is 0, takes no part in the scale of those that have some."""
    x = np.zeros((1, 1, 4, 1), np.float32)
    x[0, 0, :2, 0] = [10.3, 10.1]
    centre = np.full((1, 1, 1), 10.0, np.float32)
    y, _, scale = ops.quantise(x, None, np.array([7]), centre, format="int8", block=4, tokens=4)
    np.testing.assert_allclose(scale, 0.3 / 127, rtol=1e-5)
    np.testing.assert_allclose(y.ravel(), [10.3, 10.1, 0, 0], atol=0.3 / 127)


def test_a_block_far_longer_than_the_tokens_takes_no_memory(rng):
    """A plan that was read from a file may ask for one."""
    x = rng.standard_normal((1, 2, 30, 4)).astype(np.float32)
    expected, found = (ops.quantise(x, format="int8", block=block) for block in (30, 2**31 - 1))
    for right, got in zip(expected, found, strict=True):
        np.testing.assert_array_equal(got, right)


def test_nan_stays_in_its_group_unless_a_mean_is_taken_off():
    x = np.ones((1, 1, 8, 4), np.float32)
    x[0, 0, 5, 2] = np.nan
    with np.errstate(invalid="ignore"):
        y = ops.quantise(x, format="int8", block=4)[0]
        centred = ops.quantise(x, format="int8", block=4, centred=True)[0]
    assert np.isnan(y[0, 0, 4:]).all()
    assert np.isfinite(y[0, 0, :4]).all()
    assert np.isnan(centred).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "int4"}, "format='int4' is not known; choose one of 'int8', 'e4m3'"),
        ({"block": None}, "one of block and by_channel"),
        ({"by_channel": True}, "one of block and by_channel"),
        ({"scale": "%s"}, "takes a scale with by_channel alone"),
        ({"centred": 1}, "centred=1 is neither True nor False"),
        ({"block": 0}, "block=0 is not allowed"),
    ],
)
def test_a_quantise_that_cannot_be_is_refused(changes, said):
    with pytest.raises(PlanFormatError, match=said):
        ops.Quantise(**{"x": "%k", "y": "%y", "format": "int8", "block": 8, **changes})


# -- attention ---------------------------------------------------------------------------------------


def emulated(q, k, v, centre, dense, scale):
    """`AttendQuantised` over all tokens at once in float64: output and log-sum-exp."""
    q, k, v, centre = (np.asarray(x, np.float64) for x in (q, k, v, centre))
    group = q.shape[1] // k.shape[1]
    k, v, centre = (np.repeat(x, group, axis=1) for x in (k, v, centre))
    logits = np.where(dense, np.einsum("bhqd,bhkd->bhqk", q, k) * scale, -np.inf)
    peak = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isinf(peak), 0, peak))
    total = weights.sum(axis=-1, keepdims=True)
    nothing = total[..., 0] == 0
    mixed = (e4m3(weights * 256).astype(np.float64) / 256) @ (v - centre[:, :, None])
    out = centre[:, :, None] + mixed / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        return np.where(nothing[..., None], 0, out), (peak + np.log(total))[..., 0]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_attention_is_the_plain_emulation(precision, library, rng):
    """From quantised tensors on, under a given mask with rows that keep nothing, with grouped heads."""
    problem = AttentionProblem(2, 4, TOKENS, TOKENS, 16, "float32", 2)
    layout = TokenLayout(GRID, TEXT, block=8)
    planned = plan(problem, layout, Fixed(), returns=("%out", "%lse"), precision=precision)
    shape = (2, 4, planned.q_axis.blocks, planned.kv_axis.blocks)
    blocks = rng.random(shape) < 0.5
    blocks[0, 1, 2] = False
    tensors = [rng.standard_normal(s, dtype=np.float32) for s in (problem.q_shape, *[problem.kv_shape] * 2)]
    tensors[1] += 2
    tensors[2] += 5
    mask = BlockMask.from_bool(blocks, TOKENS, TOKENS, (8, 8))
    if library == "torch":
        run = lower(planned, backend="torch")
        out, lse = run(
            *map(torch.from_numpy, tensors), mask=BlockMask.from_bool(torch.from_numpy(blocks), TOKENS, TOKENS, (8, 8))
        )
    else:
        out, lse = lower(planned, backend="reference")(*tensors, mask=mask)
    values = {"%q": tensors[0], "%k": tensors[1], "%v": tensors[2], "%order": layout.order}
    for op in planned.ops:
        if isinstance(op, ops.Quantise):
            values |= op.evaluate(values)
    expected, expected_lse = emulated(
        *(values[name] for name in ("%q8", "%k8", "%v8", "%vc")), mask.to_dense(layout), problem.scale
    )
    assert relative(out, expected) < 1e-3  # weights round another way where float32 is a bit off
    finite = np.isfinite(expected_lse)
    np.testing.assert_allclose(np.asarray(lse)[finite], expected_lse[finite], atol=1e-4)
    assert not finite.all()
    assert (np.asarray(lse)[~finite] == -np.inf).all()
    assert (np.asarray(out)[~finite] == 0).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("omitted", ["drop", "summary"])
@pytest.mark.parametrize("rotate", [False, True])
def test_it_comes_close_to_attention_and_selects_the_same_blocks(precision, omitted, rotate, rng):
    shape = (2, 2, 8 * 64 + 50, 64)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    own = {"sparsity": 0.5, "block": 32, "return_mask": True, "return_lse": True, "omitted": omitted}
    own |= {"kv_lengths": np.array([shape[2], 400]), "backend": "reference"}
    out, lse, mask = rainfusion.attention(q, k + 1, v + 3, **own)
    out8, lse8, mask8 = rainfusion.attention(q, k + 1, v + 3, **own, precision=precision, rotate=rotate)
    np.testing.assert_array_equal(mask.blocks, mask8.blocks)
    assert 0 < relative(out8, out) < {"int8": 0.002, "fp8": 0.003}[precision]
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(lse8))
    finite = np.isfinite(lse)
    np.testing.assert_allclose(lse8[finite], lse[finite], atol=0.25)
    assert (out8[1, :, 400:] == 0).all()


def test_rotation_helps_where_channels_are_far_larger(rng):
    q, k, v = (rng.standard_normal((1, 2, 256, 64), dtype=np.float32) for _ in range(3))
    for x in (q, k):
        x[..., :3] *= 10
    exact = rainfusion.attention(q, k, v, sparsity=0, backend="reference")
    errors = {
        rotate: relative(
            rainfusion.attention(q, k, v, sparsity=0, precision="int8", rotate=rotate, backend="reference"), exact
        )
        for rotate in (False, True)
    }
    assert errors[True] < errors[False] * 0.7


def test_merging_two_halves_of_the_keys_is_the_whole(rng):
    """The log-sum-exp holds although keys are less their mean, which differs between the halves."""
    q, k, v = (rng.standard_normal((1, 2, 256, 32), dtype=np.float32) for _ in range(3))
    k[:, :, 128:] += 1
    own = {"sparsity": 0, "return_lse": True, "backend": "reference"}
    exact, exact_lse = rainfusion.attention(q, k, v, **own)
    whole, _ = rainfusion.attention(q, k, v, **own, precision="int8")
    halves = [
        rainfusion.attention(q, k[:, :, part], v[:, :, part], **own, precision="int8")
        for part in (slice(128), slice(128, None))
    ]
    out, lse = rainfusion.merge(*halves[0], *halves[1])
    assert relative(out, exact) < 1.5 * relative(whole, exact)
    np.testing.assert_allclose(lse, exact_lse, atol=0.02)


@st.composite
def tasks(draw):
    """Grids, text, blocks of two sizes, grouped heads, two lengths, both tensor layouts, lengths of samples."""
    block = draw(st.sampled_from([8, (8, 4), (4, 16)]))
    grid = draw(st.none() | st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 6)))
    layout = TokenLayout(grid, draw(st.integers(0, 9)) if grid else 0, block=block, sink=None)
    own, other = layout.length or draw(st.integers(8, 60)), draw(st.integers(8, 60))
    q_len, kv_len = draw(st.sampled_from([(own, own), (own, other), (other, own)]))
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2)]))
    dtype, tensor_layout = draw(st.sampled_from(["float32", "float64"])), draw(st.sampled_from(["bhsd", "bshd"]))
    problem = AttentionProblem(2, heads, q_len, kv_len, 16, dtype, kv_heads, None, tensor_layout)
    settings = {
        "policy": draw(st.sampled_from([TopK(0), TopK(0.5), TopP(0.7)])),
        "omitted": draw(st.sampled_from(["drop", "summary"])),
        "kv_lengths": draw(st.booleans()),
        "returns": ("%out", "%lse", "%mask"),
    }
    in_8_bits = {"precision": draw(st.sampled_from(PRECISIONS)), "rotate": draw(st.booleans())}
    return problem, layout, settings, in_8_bits, draw(st.integers(0, kv_len))


@settings(max_examples=60)
@given(tasks())
def test_any_problem_comes_close_to_exact_attention(task):
    problem, layout, own, in_8_bits, length = task
    rng = np.random.default_rng(5)
    tensors = [rng.standard_normal(s).astype(problem.dtype) for s in (problem.q_shape, *[problem.kv_shape] * 2)]
    exact, rounded = quietly(problem, layout, **own), quietly(problem, layout, **own, **in_8_bits)
    assert Plan.from_json(rounded.to_json()) == rounded
    given = {"kv_lengths": np.array([problem.kv_len, length])} if exact.takes("%kv_lengths") else {}
    out, lse, mask = lower(exact, backend="reference")(*tensors, **given)
    for backend in ("reference", "torch"):
        out8, lse8, mask8 = lower(rounded, backend=backend, device="cpu")(*tensors, **given)
        np.testing.assert_array_equal(np.asarray(mask8.blocks), np.asarray(mask.blocks))
        assert relative(out8, out) < {"int8": 0.04, "fp8": 0.08}[in_8_bits["precision"]]
        assert out8.dtype == out.dtype
        np.testing.assert_array_equal(np.isinf(lse8), np.isinf(lse))
        finite = np.isfinite(lse)
        np.testing.assert_allclose(lse8[finite], lse[finite], atol=0.2)


@pytest.mark.parametrize("centre", ["%kb", "%q"])
def test_a_centre_of_another_shape_is_refused(centre):
    planned = plan(AttentionProblem(1, 2, 64, 64, 16), TokenLayout(block=8), TopK(0.5), precision="fp8")
    attend = planned.find(ops.AttendQuantised)
    wrong = tuple(replace(op, centre=centre) if op is attend else op for op in planned.ops)
    with pytest.raises(PlanFormatError, match="one number a channel is float32"):
        replace(planned, ops=wrong)


# -- plans and passes --------------------------------------------------------------------------------


def test_a_plan_prints_it():
    problem = AttentionProblem(1, 4, 3000, 3000, 128, "bfloat16", 2)
    planned = quietly(problem, TokenLayout((10, 15, 20)), TopK(0.5), precision="int8", omitted="summary", rotate=True)
    lines = str(planned).splitlines()
    at = next(i for i, line in enumerate(lines) if "%q8 " in line)
    assert lines[at:] == [
        "  %q8              = quantise     %q %order  int8 rotated block=128",
        "  %k8, %kc         = quantise     %k %order  int8 centred rotated block=128",
        "  %v8, %vc, %vs    = quantise     %v %order  e4m3 by_channel centred",
        "  %kept, %kept_lse = attend_quantised %q8 %k8 %v8 %order %inverse %mask %vc  block=128x128 scale=0.08839",
        "  %kb8             = quantise     %kb %kc  int8 rotated block=128 tokens=128",
        "  %vb8             = quantise     %vb %vc %vs  e4m3 by_channel tokens=128",
        "  %rest, %rest_lse = attend_means_quantised %q8 %kb8 %vb8 %mask %order %inverse %vc  block=128x128 "
        "scale=0.08839",
        "  %out             = merge        %kept %kept_lse %rest %rest_lse",
        "  return %out",
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_json_and_keys_hold_the_precision(precision, omitted):
    problem, layout = AttentionProblem(1, 2, TOKENS, TOKENS, 16), TokenLayout(GRID, TEXT, block=8)
    planned = quietly(problem, layout, omitted=omitted, precision=precision, kv_lengths=True, returns=("%out", "%lse"))
    assert Plan.from_json(planned.to_json()) == planned
    plain = quietly(problem, layout, omitted=omitted, kv_lengths=True, returns=("%out", "%lse"))
    other = quietly(problem, layout, omitted=omitted, precision=precision, rotate=True, kv_lengths=True)
    assert len({planned.key, plain.key, other.key}) == 3
    assert planned.density == plain.density
    assert planned.flops == plain.flops
    assert planned.summarises == plain.summarises


STEPS = {
    "select": lambda p: passes.select_blocks(p, TopK(0.4)),
    "summary": passes.summarise_omitted,
    "precision": lambda p: passes.quantised(p, "int8"),
    "returning": lambda p: passes.returning(p, ("%out", "%lse", "%qb")),
    "lengths": passes.limit_lengths,
    "order": passes.in_window_order,
}


def orders():
    """Every place for the precision among the other passes: a mask first, lengths and order last."""
    for early, late in itertools.product(
        itertools.permutations(("summary", "returning")), itertools.permutations(("lengths", "order"))
    ):
        others = ["select", *early, *late]
        yield from ([*others[:at], "precision", *others[at:]] for at in range(len(others) + 1))


@pytest.mark.parametrize("steps", list(orders()), ids="-".join)
def test_passes_compose_with_the_precision_at_any_place(steps):
    problem, layout = AttentionProblem(1, 2, TOKENS, TOKENS, 16), TokenLayout(GRID, TEXT, block=8)
    built = expected = passes.dense(problem, layout)
    for name in steps:
        built = STEPS[name](built)
    for step in STEPS.values():
        expected = step(expected)
    assert {*passes.prune(built).ops} == {*passes.prune(expected).ops}


def test_summaries_of_a_plan_that_was_quantised_and_pruned():
    problem, layout = AttentionProblem(1, 2, TOKENS, TOKENS, 16), TokenLayout(GRID, TEXT, block=8)
    early = passes.prune(passes.quantised(passes.select_blocks(passes.dense(problem, layout), TopK(0.4)), "fp8"))
    late = passes.quantised(
        passes.summarise_omitted(passes.select_blocks(passes.dense(problem, layout), TopK(0.4))), "fp8"
    )
    assert {*passes.prune(passes.summarise_omitted(early)).ops} == {*passes.prune(late).ops}


def test_cross_attention_quantises_all_queries():
    """Lengths are those of the keys alone where queries are others."""
    problem = AttentionProblem(2, 2, 40, TOKENS, 16)
    layout = TokenLayout(GRID, TEXT, block=8)
    planned = quietly(problem, layout, TopK(0.5), kv_lengths=True, precision="fp8")
    quantised = {op.y: op for op in planned.ops if isinstance(op, ops.Quantise)}
    assert (quantised["%q8"].lengths, quantised["%q8"].order) == (None, None)
    assert (quantised["%k8"].lengths, quantised["%k8"].order) == ("%kv_lengths", "%order")


def test_a_plan_without_attention_stays_as_it_is():
    problem = AttentionProblem(1, 2, 64, 64, 16)
    mine = plan(problem, TokenLayout(block=8), TopK(0.5), returns="%mask")
    assert plan(problem, TokenLayout(block=8), TopK(0.5), returns="%mask", precision="int8") == mine
    assert passes.quantised(mine, "int8") is mine


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "int4"}, "precision='int4' is not known; choose one of None, 'int8', 'fp8'"),
        ({"precision": 8}, "precision=8 is not known"),
        ({"rotate": True}, "rotate=True has no effect without a precision; give precision='int8' or 'fp8', too"),
        ({"precision": "fp8", "rotate": "yes"}, "rotate='yes' is not a truth value"),
        ({"precision": "fp8", "rotate": True}, "head_dim=24 has no Hadamard transform, only a power of two has"),
    ],
)
def test_what_cannot_be_is_refused_in_words(settings, said, rng):
    x = rng.standard_normal((1, 2, 64, 24), dtype=np.float32)
    with pytest.raises(ProblemError, match=said):
        rainfusion.attention(x, x, x, backend="reference", **settings)


def test_a_plan_is_quantised_once():
    planned = plan(AttentionProblem(1, 2, 64, 64, 16), policy=TopK(0), precision="int8")
    with pytest.raises(PlanFormatError, match="attends in 8 bits already"):
        passes.quantised(planned, "fp8")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_call_that_only_emulates_it_says_so(backend, rng):
    """All but the reference, of which no speed is expected."""
    x = rng.standard_normal((1, 1, 32, 16), dtype=np.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rainfusion.attention(x, x, x, block=16, sparsity=0.5, precision="fp8", backend=backend)
    told = [str(note.message) for note in said if issubclass(note.category, SpeedWarning)]
    assert ["torch on cpu has no kernels of 8 bits" in text for text in told] == [True] * (backend == "torch")


# -- backends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_kernels_of_exact_attention_do_not_take_it(precision, omitted, rng):
    problem = AttentionProblem(1, 4, 300, 300, 32, "float32", 2)
    planned = plan(
        problem, TokenLayout(block=32), TopK(0.5), omitted=omitted, precision=precision, returns=("%out", "%lse")
    )
    tensors = [rng.standard_normal(s, dtype=np.float32) for s in (problem.q_shape, *[problem.kv_shape] * 2)]
    expected, expected_lse = lower(planned, backend="reference")(*tensors)
    for backend in ("torch", "openvino"):
        run = lower(planned, backend=backend, device="cpu")
        in_8_bits = [s for s in run.steps if any("quantise" in op.name for op in s.segment.ops)]
        assert {s.by for s in in_8_bits} == {"definition"}
        out, lse = run(*tensors)
        assert relative(out, expected) < 2e-3
        np.testing.assert_allclose(lse, expected_lse, atol=1e-2)


@pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SpeedWarning")
def test_the_torch_operator_records_it(rng):
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 2, 96, 16), dtype=np.float32)) for _ in range(3))

    def call(q, k, v):
        return rainfusion.attention(q, k, v, sparsity=0.4, block=16, precision="int8", rotate=True, backend="torch")

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v), rtol=0, atol=0)
