"""Plans: what they print, that they are the same plan when asked twice, and that JSON cannot lie."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import re
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rainfusion import AttentionProblem, Fixed, Hybrid, Plan, TokenLayout, TopK, TopP, lower, plan
from rainfusion.core.errors import LayoutError, PlanFormatError, PolicyError, ProblemError, SparsityWarning
from rainfusion.core.ops import Data
from rainfusion.core.policies import from_dict as policy_from_dict

WAN = AttentionProblem(1, 40, 75600, 75600, 128, "bfloat16")
GRID = TokenLayout((21, 45, 80))


def test_a_plan_prints_the_whole_method():
    assert str(plan(WAN, GRID, TopK(0.8))) == (
        "plan v2   b=1 h=40 q=75600 kv=75600 d=128 bf16 bhsd   grid 21x45x80   density=0.2000   "
        "64.8 free blocks a row   protected=0.48\n"
        "  given %q %k %v\n"
        "  %order, %inverse = window_order (grid 21x45x80) window=2x8x8 sink=first_frame block=128x128\n"
        "  %qb              = block_mean   %q %order  block=128\n"
        "  %kb              = block_mean   %k %order  block=128\n"
        "  %score           = block_score  %qb %kb  scale=0.08839\n"
        "  %quotas          = constant     64..65 int32[1, 562]\n"
        "  %mask            = select       %score %quotas  protect=29x29\n"
        "  %out             = attend       %q %k %v %order %inverse %mask  block=128x128 scale=0.08839\n"
        "  return %out"
    )


def test_a_plan_with_everything_prints_it():
    problem = AttentionProblem(2, 8, 2090, 512, 64, kv_heads=2, tensor_layout="bshd")
    layout = TokenLayout((5, 20, 20), text=90, text_position="start", block=(128, 64), sink=None)
    planned = plan(problem, layout, TopP(0.9, floor=0.1), omitted="summary", returns=["%mask", "%lse", "%out"])
    assert str(planned) == (
        "plan v2   b=2 h=8/2 q=2090 kv=512 d=64 f32 bshd   grid 5x20x20 text=90@start   density=data\n"
        "  given %q %k %v\n"
        "  %order, %inverse = window_order (grid 5x20x20 text=90@start) window=2x8x8 block=128x64\n"
        "  %qb              = block_mean   %q %order  block=128\n"
        "  %kb              = block_mean   %k  block=64\n"
        "  %vb              = block_mean   %v  block=64\n"
        "  %score           = block_score  %qb %kb  scale=0.125\n"
        "  %quotas          = constant     1 int32[1, 15]\n"
        "  %mask            = select       %score %quotas  protect=2x0 mass=0.9\n"
        "  %kept, %kept_lse = attend       %q %k %v %order %inverse %mask  block=128x64 scale=0.125\n"
        "  %rest, %rest_lse = attend_means %q %kb %vb %mask %order %inverse  block=128x64 scale=0.125\n"
        "  %out, %lse       = merge        %kept %kept_lse %rest %rest_lse\n"
        "  return %out %lse %mask"
    )


@pytest.mark.parametrize(
    ("policy", "order", "lines"),
    [
        (
            Fixed(),
            "given",
            ["  given %q %k %v %mask", "  %out = attend       %q %k %v %mask  block=128x128 scale=0.08839"],
        ),
        (TopK(0), "window", ["  given %q %k %v", "  %out = attend       %q %k %v  scale=0.08839"]),
    ],
    ids=str,
)
def test_what_is_not_needed_disappears(policy, order, lines):
    assert str(plan(WAN, GRID, policy, order=order)).splitlines()[1:] == [*lines, "  return %out"]


def test_what_changes_from_call_to_call_is_given():
    layout = TokenLayout((20, 45, 80), text=3600)
    planned = plan(WAN, layout, quotas=True, kv_lengths=True, returns=["%out", "%qb", "%score"])
    assert planned.given == ("%q", "%k", "%v", "%quotas", "%kv_lengths")
    assert planned.density is None
    assert planned.types["%quotas"] == ((40, planned.q_axis.free_blocks), "int32")
    assert plan(WAN, layout, TopK(0.8), quotas=True) == plan(WAN, layout, TopK(0.9), quotas=True)
    assert planned.quotas(TopK((0.8,) * 40)).shape == (40, planned.q_axis.free_blocks)
    reused = plan(WAN, layout, Fixed(), returns=["%out", "%qb", "%kb"])
    assert [op.name for op in reused.ops] == ["window_order", "block_mean", "block_mean", "attend"]


@st.composite
def plans(draw):
    block = draw(st.sampled_from([16, (16, 32), (8, 4)]))
    grid = draw(st.one_of(st.none(), st.tuples(*[st.integers(1, 9)] * 3)))
    text = draw(st.integers(0, 20)) if grid else 0
    layout = TokenLayout(grid, text, draw(st.sampled_from(["start", "end"])), block=block)
    length = layout.length or 77
    policy = draw(
        st.one_of(
            st.builds(TopK, st.floats(0, 1, exclude_max=True), st.sampled_from(["realised", "paper"])),
            st.builds(TopP, st.floats(0, 1), st.floats(0, 1)),
            st.builds(Hybrid, st.floats(0, 1, exclude_max=True), st.floats(0, 1)),
            st.builds(TopK, st.tuples(*[st.floats(0, 0.99)] * 6)),
            st.just(Fixed()),
        )
    )
    scale = draw(st.one_of(st.none(), st.floats(-10, 10)))
    problem = AttentionProblem(2, 6, length, draw(st.sampled_from([length, 50])), 8, "float16", 3, scale)
    returns = draw(st.sets(st.sampled_from(["%out", "%lse", "%mask", "%qb", "%kb", "%score"]), min_size=1))
    return quietly(
        problem,
        layout,
        policy,
        omitted=draw(st.sampled_from(["drop", "summary"])),
        order=draw(st.sampled_from(["window", "given"])),
        returns=returns,
        quotas=draw(st.booleans()) and not isinstance(policy, Fixed),
        kv_lengths=draw(st.booleans()),
    )


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsityWarning)
        return plan(*args, **kwargs)


@given(plans())
def test_json_gives_the_plan_back(planned):
    read = Plan.from_json(planned.to_json())
    assert read == planned
    assert hash(read) == hash(planned)
    assert str(read) == str(planned)
    assert read.key == planned.key
    assert pickle.loads(pickle.dumps(planned)) == planned
    assert copy.deepcopy(planned) == planned


def test_the_same_question_has_the_same_plan():
    planned = plan(WAN, GRID, TopK(0.8))
    again = plan(AttentionProblem(1, 40, 75600, 75600, 128, "bfloat16"), TokenLayout((21, 45, 80)), TopK(0.8))
    assert planned is again
    assert plan(WAN, GRID) is planned
    assert plan(WAN, GRID, returns=["%mask", "%out"]) is plan(WAN, GRID, returns=("%out", "%mask"))
    assert plan(WAN, GRID, TopK(0.81)) != planned
    assert len({planned, again, plan(WAN, GRID, TopK(0.81))}) == 2


def test_what_no_machine_can_hold_is_refused_before_memory_is_touched():
    problem = AttentionProblem(1, 1, 2**31 - 1, 2**31 - 1, 64)
    with pytest.raises(ProblemError, match="need a mask of 4611686014132420609 bytes"):
        plan(problem, TokenLayout(block=1), TopK(0.9))
    assert plan(problem, TokenLayout(block=8192), TopK(0.9)).density == pytest.approx(0.1)


SMALL = plan(AttentionProblem(1, 2, 512, 512, 16), TokenLayout((8, 8, 8), block=32), TopK(0.5))


def tampered(path: str, value) -> str:
    """The small plan's JSON with one value replaced, added or (None) removed."""
    record = json.loads(SMALL.to_json())
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    place = record
    for step in parents:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rainfusion_plan", 1),
        ("rainfusion_plan", "2"),
        ("rainfusion_plan", None),
        ("surprise", 1),
        ("problem.surprise", 1),
        ("problem.batch", None),
        ("problem.batch", 0),
        ("problem.batch", True),
        ("problem.heads", "2"),
        ("problem.heads", 2.0),
        ("problem.q_len", 10**12),
        ("problem.q_len", 513),
        ("problem.head_dim", 10**400),
        ("problem.dtype", "int8"),
        ("problem.scale", float("nan")),
        ("problem.scale", "0.25"),
        ("problem", [1, 2]),
        ("layout", [8, 8]),
        ("layout.surprise", 1),
        ("layout.block", [2**20 + 7, 2**20 + 9]),
        ("returns", []),
        ("returns", ["%out", "%secret"]),
        ("returns", ["%secret"]),
        ("returns", "%out"),
        ("ops", []),
        ("ops.0.op", "exec"),
        ("ops.0.op", ["window_order"]),
        ("ops.0.surprise", 1),
        ("ops.0.order", "%mask"),
        ("ops.0.order", "order"),
        ("ops.1.block", 0),
        ("ops.1.block", 64),
        ("ops.1.x", "%order"),
        ("ops.1.x", None),
        ("ops.3.scale", "1"),
        ("ops.3.qb", "%score"),
        ("ops.4.data.shape", [1, 13]),
        ("ops.4.data.shape", [1, 2**40]),
        ("ops.4.data.dtype", "object"),
        ("ops.4.data.zlib", "%%%"),
        ("ops.4.data", None),
        ("ops.5.over", "some"),
        ("ops.5.mass", 2),
        ("ops.5.kv.block", 64),
        ("ops.5.kv", 3),
        ("ops.6.mask", "%score"),
        ("ops.6.mask", "%unknown"),
        ("ops.6.inverse", None),
        ("ops.6.block", [1, 1]),
        ("ops.6.block", 32),
        ("ops.6.out", "%mask"),
        ("ops.6", None),
    ],
)
def test_tampered_json_is_refused(path, value):
    with pytest.raises(PlanFormatError):
        Plan.from_json(tampered(path, value))


def test_a_program_that_the_planner_would_not_write_is_read():
    """What is checked is that operations fit, not who wrote them: here without selection's order, and another scale."""
    record = json.loads(SMALL.to_json())
    record["ops"][3]["scale"] = 7.0
    del record["ops"][1]["order"], record["ops"][2]["order"]
    read = Plan.from_json(json.dumps(record))
    assert read != SMALL
    assert read.key != SMALL.key
    assert Plan.from_json(read.to_json()) == read
    q, k, v = (np.random.default_rng(5).standard_normal((1, 2, 512, 16), dtype=np.float32) for _ in "qkv")
    assert lower(read, backend="reference")(q, k, v).shape == q.shape


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '"plan"', "{}", "[" * 10**5, "1" * 5000, "\0"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanFormatError, match="not a rainfusion plan"):
        Plan.from_json(text)


def test_a_refusal_says_what_differs():
    with pytest.raises(PlanFormatError, match=r"`attend .*` reads %unknown, which nothing before it makes"):
        Plan.from_json(tampered("ops.6.mask", "%unknown"))
    with pytest.raises(PlanFormatError, match="operation 'exec' is not known; known are all_blocks, attend"):
        Plan.from_json(tampered("ops.0.op", "exec"))
    with pytest.raises(PlanFormatError, match="plan format 1 is not known; this rainfusion reads 2"):
        Plan.from_json(tampered("rainfusion_plan", 1))


def test_data_says_no_more_than_it_holds():
    data = Data(np.arange(12, dtype=np.int32).reshape(3, 4))
    assert Data.from_dict(data.to_dict()) == data
    assert hash(Data.from_dict(data.to_dict())) == hash(data)
    assert data != Data(np.arange(12, dtype=np.int64).reshape(3, 4))
    record = data.to_dict()
    bomb = base64.b64encode(zlib.compress(bytes(2**24))).decode()
    for broken in ({"zlib": bomb}, {"shape": [3, 5]}, {"shape": [2**20] * 4}, {"shape": [-3, -4]}, {"dtype": "|O"}):
        with pytest.raises(PlanFormatError):
            Data.from_dict({**record, **broken})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"omitted": "forget"}, ProblemError, "omitted='forget' is not known; choose one of 'drop', 'summary'"),
        ({"order": "raster"}, ProblemError, "order='raster' is not known; choose one of 'window', 'given'"),
        ({"returns": ["%q"]}, ProblemError, "returns='%q' is not known"),
        ({"returns": []}, ProblemError, "returns is empty"),
        ({"returns": 3}, ProblemError, "returns=3 names no values"),
        ({"policy": Fixed(), "quotas": True}, PolicyError, "quotas have no effect"),
        ({"policy": 0.8}, PolicyError, r"policy=0.8 is not a policy; give TopK\(...\)"),
        ({"layout": (21, 45, 80)}, ProblemError, "layout is a tuple; give a TokenLayout"),
        ({"problem": None}, ProblemError, "problem is a NoneType; give a AttentionProblem"),
        ({"layout": TokenLayout((2, 3, 4))}, LayoutError, "grid 2x3x4 makes 24 tokens, but q has 75600"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, error, said):
    arguments = {"problem": WAN, "layout": GRID, "policy": TopK()} | change
    with pytest.raises(error, match=said):
        plan(**arguments)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TopK(1), r"sparsity=1 is out of range; give a number in \[0, 1\)"),
        (lambda: TopK(-0.1), r"sparsity=-0.1 is out of range"),
        (lambda: TopK(float("nan")), r"sparsity=nan is not a finite number"),
        (lambda: TopK("0.8"), r"sparsity='0.8' is not a finite number; give a number in \[0, 1\)"),
        (lambda: TopK(False), r"sparsity=False is not a finite number"),
        (lambda: TopK(np.True_), r"sparsity=.*True_? is not a finite number|sparsity=np.True_"),
        (lambda: TopK(None), r"sparsity=None is not a finite number"),
        (lambda: TopK([0.8, "x"]), r"sparsity='x' is not a finite number"),
        (lambda: TopK(()), r"sparsity=\(\) names no head"),
        (lambda: TopK(0.8, counting="mine"), r"counting='mine' is not known; choose one of 'realised', 'paper'"),
        (lambda: TopP(1.1), r"mass=1.1 is out of range; give a number in \[0, 1\]"),
        (lambda: TopP(0.5, floor=2), r"floor=2 is out of range"),
    ],
)
def test_what_is_no_policy_is_refused(make, said):
    with pytest.raises(PolicyError, match=said):
        make()


def test_numbers_of_numpy_make_the_same_policy():
    assert TopK(np.float64(0.75)) == TopK(0.75)
    assert hash(TopK(np.float32(0.75))) == hash(TopK(0.75))
    for policy in (TopK((0.5, 0.25)), TopP(0.5, 0.1), Hybrid(0.5, 0.1), Fixed()):
        assert policy_from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_a_warning_is_said_at_the_line_that_asked():
    with pytest.warns(SparsityWarning, match=re.escape("sparsity=0.9 cannot be reached on grid 2x8x8")) as caught:
        plan(AttentionProblem(1, 1, 128, 128, 4), TokenLayout((2, 8, 8), block=16), TopK(0.9))
    assert caught[0].filename == __file__
