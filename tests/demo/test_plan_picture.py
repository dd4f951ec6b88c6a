"""Pictures of plans: every layout of parts is planned, printed, run and drawn."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import rainfusion
from rainfusion import Grid, Text, TokenLayout, Tokens, TopK
from rainfusion.core.errors import LayoutError
from rainfusion.demo import budget, plan_picture
from rainfusion.demo.sequence import pieces

pytestmark = pytest.mark.filterwarnings("ignore::rainfusion.SparsityWarning")

LAYOUTS = {
    "edit": TokenLayout(parts=(Text(37), Grid(1, 13, 15), Grid(1, 9, 11), Grid(1, 8, 8)), block=16),
    "packed": TokenLayout(parts=(Grid(4, 6, 8), Tokens(30), Grid(3, 5, 7), Tokens(20), Text(9)), block=16),
    "first and last": TokenLayout((9, 7, 9), 11, "start", block=16, sink=("first_frame", "last_frame_keys")),
    "both as keys": TokenLayout((9, 7, 9), block=(16, 32), sink=("first_frame_keys", "last_frame_keys")),
    "text alone": TokenLayout(parts=(Text(40), Tokens(100)), block=16),
    "one image": TokenLayout((1, 9, 9), text=20, block=32),
    "many clips": TokenLayout(parts=(Grid(2, 4, 4),) * 9, block=16),
}


def plan_of(layout, policy=None, **settings):
    problem = rainfusion.AttentionProblem(1, 2, layout.length, layout.length, 16)
    return rainfusion.plan(problem, layout, policy or TopK(0.4), **settings)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def test_a_layout_is_planned_printed_run_and_drawn(layout, tmp_path, rng, naive):
    plan = plan_of(layout)
    assert str(layout) in str(plan)
    assert rainfusion.Plan.from_json(plan.to_json()) == plan
    q, k, v = rng.standard_normal((3, 1, 2, layout.length, 16), np.float32)
    out, mask = rainfusion.attention(
        q, k, v, parts=layout.parts, block=layout.block, sparsity=0.4, return_mask=True, backend="reference"
    )
    assert np.allclose(out, naive(q, k, v, mask.to_dense(layout))[0], atol=1e-5)
    plan_picture.draw(tmp_path / "plan.png", plan)
    with Image.open(tmp_path / "plan.png") as image:
        assert image.width == 1800
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_pieces_stand_where_the_order_puts_their_tokens(layout):
    found = pieces(layout)
    assert [piece.place for piece in found] == [*np.cumsum([0, *(piece.tokens for piece in found)])[:-1]]
    assert sum(piece.tokens for piece in found) == layout.length
    part_of = np.repeat(np.arange(len(layout.parts)), [part.count for part in layout.parts])[layout.order]
    for piece in found:
        assert np.all(part_of[piece.place : piece.place + piece.tokens] == piece.part)
        if piece.kind not in ("windows", "ragged"):
            assert layout.order[piece.place] == piece.start
    protected = [piece.place for piece in found if piece.kind in ("keys", "sink", "text")]
    assert protected == [r.start for r in layout.protected]


POLICIES = {
    "topk": TopK(0.1),
    "per head": TopK((0.2, 0.6)),
    "topp": rainfusion.TopP(0.9),
    "hybrid": rainfusion.Hybrid(0.5, 0.8),
    "paper": TopK(0.5, "paper"),
    "fixed": rainfusion.Fixed(),
    "dense": TopK(0.0),
}
WORDS = {
    "topk": "17 or 18 of 20 unprotected key blocks",
    "per head": "4 to 15 of 20 unprotected key blocks",
    "topp": "the fewest key blocks that hold 90% of the mass",
    "hybrid": "the fewest key blocks that hold 80% of the mass, at least 6 or 7 of 20 unprotected key blocks",
    "paper": "the best 12 of all 23 key blocks, and the protected ones",
    "fixed": "what a mask says that is given at call time",
    "dense": "every key block",
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_budget_in_words_and_its_picture(name, tmp_path):
    plan = plan_of(TokenLayout((5, 8, 8), 40, block=16, sink=None), POLICIES[name])
    assert budget.kept_words(plan) == WORDS[name]
    plan_picture.draw(tmp_path / "plan.png", plan)
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_quotas_that_are_given_later_are_said_to_be():
    plan = plan_of(LAYOUTS["edit"], quotas=True)
    assert budget.kept_words(plan) == "as many unprotected key blocks as quotas say that are given at call time"
    assert budget.density_bounds(plan) is None


@pytest.mark.parametrize("name", ["topk", "per head", "topp", "hybrid", "paper", "dense"])
def test_the_density_lies_within_its_bounds(name, rng):
    layout = LAYOUTS["first and last"]
    low, high = budget.density_bounds(plan_of(layout, POLICIES[name]))
    q, k = rng.standard_normal((2, 1, 2, layout.length, 16), np.float32)
    mask = rainfusion.select(q, k, parts=layout.parts, block=layout.block, policy=POLICIES[name], backend="reference")
    assert low - 1e-9 <= mask.density <= high + 1e-9
    if name in ("topk", "per head", "dense"):
        assert low == high == pytest.approx(mask.density)


def test_a_plan_of_one_side_of_the_layout_is_drawn(tmp_path):
    layout = LAYOUTS["first and last"]
    problem = rainfusion.AttentionProblem(1, 2, 64, layout.length, 16)
    plan_picture.draw(tmp_path / "plan.png", rainfusion.plan(problem, layout, TopK(0.4)))
    swapped = replace(problem, q_len=layout.length, kv_len=64)
    plan_picture.draw(tmp_path / "plan.png", rainfusion.plan(swapped, layout, TopK(0.4)))


def test_a_plan_without_parts_is_not_drawn(tmp_path):
    with pytest.raises(LayoutError, match="no order to draw"):
        plan_picture.draw(tmp_path / "plan.png", rainfusion.plan(rainfusion.AttentionProblem(1, 1, 1280, 1280, 16)))


def test_an_order_that_is_too_long_is_not_drawn(tmp_path):
    with pytest.raises(LayoutError, match="order of 25,000,000 tokens is too long to draw"):
        plan_picture.draw(tmp_path / "plan.png", plan_of(TokenLayout((1, 5000, 5000), block=1024)))
