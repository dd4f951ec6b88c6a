"""The engine without a host: NumPy arrays on the reference backend."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest

import rainfusion
from rainfusion import Grid, Text
from rainfusion.core.errors import LayoutError, PolicyError
from rainfusion.integrations import engine as engines
from rainfusion.integrations.clock import Clock, Reading
from rainfusion.integrations.config import RainFusionConfig, Sinks
from rainfusion.integrations.engine import REST, Engine, settled
from rainfusion.integrations.report import Log

GRID = Grid(2, 8, 8)
BLOCK, HEADS = 16, 2
DENSE = object()


class Host:
    """A host with an engine of two layers, and the arguments of every call of `rainfusion.attention`."""

    def __init__(self, monkeypatch, layers=2, **settings):
        defaults = {"sparsity": 0.5, "block": BLOCK, "min_blocks": 0, "sink": None, "backend": "reference"}
        self.config = RainFusionConfig(**defaults | settings)
        self.log = Log(self.config.report_rows)
        self.engine = Engine(self.config, layers, Clock(), self.log, "model")
        self.layers, self.calls = layers, []
        attention = rainfusion.attention

        def spy(*args, **arguments):
            self.calls.append(arguments)
            return attention(*args, **arguments)

        monkeypatch.setattr(rainfusion, "attention", spy)

    def forward(self, step=None, context=None, *, steps=None, parts=(GRID,), text=0, seed=None, qkv=None, **call):
        """A forward of the whole model; returns the outputs of its layers."""
        self.engine.begin(Reading(context, step, steps), parts)
        q, k, v = tensors(text, seed) if qkv is None else qkv
        outputs = [self.engine.attend(i, q, k, v, lambda: DENSE, **call) for i in range(self.layers)]
        self.engine.end()
        return outputs

    def kinds(self, layer=0):
        return [row.kind for row in self.log.rows() if row.layer == layer]

    def whys(self, layer=0):
        return [row.why for row in self.log.rows() if row.layer == layer]


def tensors(text=0, seed=None, heads=HEADS):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((1, GRID.count + text, heads, 8), dtype=np.float32) for _ in range(3))


@pytest.fixture
def host(monkeypatch):
    return lambda **settings: Host(monkeypatch, **settings)


def test_a_call_is_attention_over_the_parts(host):
    made = host()
    q, k, v = tensors(text=9, seed=0)
    out = made.forward(0, parts=(GRID, REST), qkv=(q, k, v), scale=0.3)[0]
    parts = (Grid(2, 8, 8, sink=None), Text(9))
    expected = rainfusion.attention(
        q, k, v, parts=parts, block=BLOCK, sparsity=0.5, tensor_layout="bshd", scale=0.3, backend="reference"
    )
    np.testing.assert_array_equal(out, expected)
    row = made.log.rows()[0]
    assert (row.model, row.run, row.step, row.context, row.layer, row.kind) == ("model", 0, 0, "", 0, "sparse")
    assert row.density == pytest.approx(0.5, abs=0.01)
    assert row.ms is None


def test_dense_steps_and_layers_call_the_host(host):
    made = host(dense_steps=(1, 1), dense_layers=(1,))
    outputs = [made.forward(step, steps=3) for step in range(3)]
    assert [[out is DENSE for out in forward] for forward in outputs] == [[True, True], [False, True], [True, True]]
    assert made.whys(0) == ["first steps", "", "last steps"]
    assert made.whys(1) == ["first steps", "layer", "last steps"]


def test_shares_change_from_step_to_step(host):
    made = host(sparsity=0.25, sparsity_from_step={1: (0.5, 0.75), 2: 0})
    for step in range(3):
        made.forward(step)
    first, second = made.calls[::2]
    assert first["sparsity"] == 0.25
    assert second["quotas"].tolist() == [[4] * 8, [2] * 8]  # of 8 blocks, a half and a quarter
    assert made.whys() == ["", "", "sparsity 0"]
    densities = [row.density for row in made.log.rows() if row.layer == 0]
    assert densities == pytest.approx([0.75, 0.375, 1.0], abs=0.02)


# -- masks ---------------------------------------------------------------------------------------------


def test_masks_are_kept_for_some_steps_of_a_context(host):
    made = host(refresh_every=3)
    for step in range(7):
        for context in ("cond", "uncond"):
            made.forward(step, context, seed=step)
    expected = ["sparse", "reused", "reused", "sparse", "reused", "reused", "sparse"]
    for layer in range(2):
        for context in ("cond", "uncond"):
            rows = [row.kind for row in made.log.rows() if (row.layer, row.context) == (layer, context)]
            assert rows == expected


def test_masks_of_shares_a_head_are_kept_too(host):
    made = host(sparsity=(0.5, 0.75), refresh_every=2, share_masks=True)
    for step in range(2):
        for context in ("cond", "uncond"):
            made.forward(step, context, seed=step)
    assert made.kinds() == ["sparse", "reused", "reused", "reused"]
    assert [row.density for row in made.log.rows()] == [0.375] * 8
    mask = made.calls[2]["mask"]
    assert np.asarray(mask.blocks).mean(axis=(0, 2, 3)).tolist() == [0.5, 0.25]


def test_layers_with_other_shares_a_head_have_one_executable(host, monkeypatch):
    rainfusion.cache.clear()
    made = host(sparsity={0: (0.5, 0.75), 1: (0.75, 0.25), 2: (0.0, 0.5)}, layers=3)
    made.forward(0)
    first = made.calls[0]["quotas"]
    made.forward(1)
    assert len(rainfusion.cache._plans) == 1
    assert made.calls[3]["quotas"] is first  # kept where the call was
    assert [row.density for row in made.log.rows()] == [0.375, 0.5, 0.75] * 2


def test_shares_a_head_that_skip_nothing_worth_a_block_are_dense_plans(host):
    made = host(sparsity=(1e-9, 1e-9))
    made.forward(0)
    assert made.calls[0]["sparsity"] == (1e-9, 1e-9)
    assert made.kinds() == ["sparse"]


def test_a_probe_takes_the_sparse_calls_and_is_in_no_report(host):
    made = host(dense_layers=(1,))
    seen = []
    made.engine.probe = lambda call: seen.append((call.layer, call.moment.step, call.heads)) or "probed"
    assert made.forward(3) == ["probed", DENSE]
    assert seen == [(0, 3, HEADS)]
    assert made.whys(0) == []
    assert made.whys(1) == ["layer"]
    assert made.engine.moment is None


def test_a_reused_mask_is_the_one_that_was_made(host):
    made = host(refresh_every=2)
    made.forward(0, seed=0)
    q, k, v = tensors(seed=1)
    out = made.forward(1, qkv=(q, k, v))[1]
    settings = {"parts": (Grid(2, 8, 8, sink=None),), "block": BLOCK, "tensor_layout": "bshd", "backend": "reference"}
    _, mask = rainfusion.attention(*tensors(seed=0), sparsity=0.5, return_mask=True, **settings)
    np.testing.assert_array_equal(out, rainfusion.attention(q, k, v, mask=mask, **settings))


def test_masks_of_a_run_end_with_it(host):
    made = host(refresh_every=9)
    made.forward(0)
    made.forward(1)
    made.engine.reset()
    assert not made.engine._masks
    made.forward(2)
    assert made.kinds() == ["sparse", "reused", "sparse"]
    made.forward(1)  # the step fell: another run, which the host did not announce
    assert made.kinds()[-1] == "sparse"


@pytest.mark.parametrize("change", ["text", "grid", "share", "dtype", "order"])
def test_a_mask_that_does_not_fit_is_made_anew(host, change):
    made = host(refresh_every=9, sparsity_from_step={1: 0.75} if change == "share" else {})
    first, second = {"parts": (GRID, REST), "text": 3}, {"parts": (GRID, REST), "text": 3}
    if change == "text":
        second["text"] = 5
    if change == "grid":
        second["parts"] = (Grid(1, 8, 16), REST)
    if change == "dtype":
        second["qkv"] = tuple(x.astype(np.float64) for x in tensors(3))
    made.forward(0, **first)
    if change == "order":
        made.engine.begin(Reading(step=1), (GRID, REST), order="given")
        made.engine.attend(0, *tensors(3), lambda: DENSE)
    else:
        made.forward(1, **second)
    assert made.kinds() == ["sparse", "sparse"]


def test_a_shared_mask_is_made_by_the_first_context(host):
    made = host(share_masks=True)
    for step in range(2):
        for context in ("cond", "uncond", "third"):
            made.forward(step, context)
    assert made.kinds() == ["sparse", "reused", "reused"] * 2


def test_a_step_that_begins_again_makes_its_masks_anew(host):
    made = host(share_masks=True, refresh_every=3)
    for context in ("cond", "uncond", "cond", "uncond"):
        made.forward(0, context)
    assert made.kinds() == ["sparse", "reused"] * 2


def test_a_shared_mask_can_be_kept_too(host):
    made = host(share_masks=True, refresh_every=2)
    for step in range(3):
        for context in ("cond", "uncond"):
            made.forward(step, context)
    assert made.kinds() == ["sparse", "reused", "reused", "reused", "sparse", "reused"]


def test_shared_masks_follow_the_noise_level_where_no_step_is_said(host):
    made = host(share_masks=True, layers=1)
    for level in (9.0, 9.0, 5.0, 5.0):
        made.engine.begin(Reading(timestep=lambda level=level: level), (GRID,))
        made.engine.attend(0, *tensors(), lambda: DENSE)
        made.engine.end()
    assert made.kinds() == ["sparse", "reused"] * 2


def test_forwards_that_the_host_does_not_name_are_told_apart_by_their_order(host):
    made = host(refresh_every=2)
    for step in range(2):
        for _ in range(2):
            made.forward(step)
    assert made.kinds() == ["sparse", "sparse", "reused", "reused"]
    assert [row.context for row in made.log.rows() if row.layer == 0] == ["", "#2"] * 2
    assert len(made.engine._masks) == 4


def test_endless_forwards_of_one_step_do_not_fill_the_memory(host):
    made = host(refresh_every=2)
    for _ in range(9):
        made.forward(0)
    assert made.kinds() == ["sparse"] * 9
    assert len(made.engine._masks) == 4 * made.layers


def test_a_dense_step_between_does_not_lengthen_a_masks_life(host):
    made = host(refresh_every=3, sparsity_from_step={1: 0, 3: 0.5})
    for step in range(4):
        made.forward(step)
    assert made.kinds() == ["sparse", "dense", "dense", "sparse"]


# -- what stays dense ----------------------------------------------------------------------------------


def test_small_calls_stay_dense_and_say_so(host):
    made = host(min_blocks=9)
    assert made.forward(0)[0] is DENSE
    assert made.whys() == ["small: 8 free blocks, under 9"]
    assert host(min_blocks=8).forward(0)[0] is not DENSE
    unset = host(min_blocks=None)
    assert unset.forward(0)[0] is DENSE
    assert unset.whys() == ["small: 8 free blocks, under 32"]


def test_calls_that_do_not_pay_stay_dense_and_say_so(host, monkeypatch):
    """By the estimate of the backend, unless the user gave a number."""

    class Slow:
        candidate = type("Candidate", (), {"speedup": 0.5, "__str__": lambda _: "slow on cpu"})()

    monkeypatch.setattr(engines, "FEWEST_BLOCKS", 0)
    monkeypatch.setattr(rainfusion, "choose", lambda *_, **__: Slow)
    made = host(min_blocks=None)
    assert made.forward(0)[0] is DENSE
    assert made.whys() == ["small: slow on cpu estimates 0.50 times dense"]
    assert host(min_blocks=0).forward(0)[0] is not DENSE


def test_what_is_planned_is_settled_once(host, monkeypatch):
    plans = []
    plan = rainfusion.plan
    monkeypatch.setattr(rainfusion, "plan", lambda *args, **settings: plans.append(args) or plan(*args, **settings))
    made = host()
    for step in range(3):
        made.forward(step)
    assert len(plans) == 1


def test_a_host_can_say_why_a_call_or_a_forward_stays_dense(host):
    made = host()
    assert made.forward(0, why_dense="mask")[0] is DENSE
    made.engine.begin(Reading(step=1), None, why="an image")
    assert made.engine.attend(0, *tensors(), lambda: DENSE) is DENSE
    made.engine.end()
    assert made.whys() == ["mask", "an image"]


# -- parts ---------------------------------------------------------------------------------------------


def test_rest_is_the_text_that_is_left():
    last = Sinks("last_frame", 0.2)
    assert settled((GRID, REST), 130, last) == (Grid(2, 8, 8, sink="last_frame"), Text(2))
    assert settled((REST, GRID), 128, Sinks(None, 0.2)) == (Text(0), Grid(2, 8, 8, sink=None))
    assert settled((Grid(2, 8, 8, sink=None),), 128, last) == (Grid(2, 8, 8, sink=None),)
    assert repr(REST) == "REST"


@pytest.mark.parametrize(("parts", "length"), [((GRID,), 127), ((GRID,), 129), ((GRID, REST), 127)])
def test_parts_that_are_not_the_sequence_are_refused(parts, length):
    with pytest.raises(
        LayoutError, match=f"a sequence of {length} tokens does not hold the parts .* of 128; the adapter"
    ):
        settled(parts, length, None)


def test_no_grid_needs_no_window(host):
    made = host(window=(1, 4, 4), layers=1)
    made.forward(0, parts=(rainfusion.Tokens(128),))
    assert made.calls[0]["window"] is None
    assert made.kinds() == ["sparse"]


def test_a_call_that_is_dense_anyway_may_come_outside_of_a_forward(host):
    assert host().engine.attend(0, *tensors(), lambda: DENSE, why_dense="gradient") is DENSE


# -- forwards ------------------------------------------------------------------------------------------


def test_layers_that_are_not_called_are_noted(host):
    made = host(layers=3)
    made.engine.begin(Reading(step=0), (GRID,))
    made.engine.attend(1, *tensors(), lambda: DENSE)
    made.engine.end()
    assert {row.layer: (row.kind, row.why) for row in made.log.rows()} == {
        0: ("skipped", "not called"),
        1: ("sparse", ""),
        2: ("skipped", "not called"),
    }


def test_a_call_outside_of_a_forward_is_refused(host):
    made = host()
    made.forward(0)
    with pytest.raises(LayoutError, match="layer 1 of model was called outside of a forward of its model"):
        made.engine.attend(1, *tensors(), lambda: DENSE)


def test_a_failed_forward_ends_its_run(host):
    """Its layers that were not called are not noted, and no mask of it is used again."""
    made = host(share_masks=True, refresh_every=9, dense_steps=(1, 0))
    made.forward(0)
    made.forward(1)

    def fail():
        raise RuntimeError("no memory")

    made.engine.begin(Reading(step=0), (GRID,))
    with pytest.raises(RuntimeError, match="no memory"):
        made.engine.attend(0, *tensors(), fail)
    made.engine.end(complete=False)
    made.engine.end(complete=False)
    assert "skipped" not in made.kinds(1)
    for step in range(2):
        made.forward(step)
    assert [(row.run, row.step, row.kind) for row in made.log.rows() if row.layer == 1] == [
        (0, 0, "dense"),
        (0, 1, "sparse"),
        (2, 0, "dense"),
        (2, 1, "sparse"),
    ]


def test_another_number_of_heads_than_shares_is_refused(host):
    with pytest.raises(PolicyError, match="head"):
        host(sparsity=(0.5, 0.5, 0.5)).forward(0)


def test_layers_that_the_model_does_not_have_are_refused(host):
    with pytest.raises(PolicyError, match="the model has 2"):
        host(dense_layers=(7,))


def test_engines_that_are_copied_together_share_a_clock_again():
    config, clock = RainFusionConfig(), Clock()
    clock.tick(Reading(step=7), needs_step=True)
    first, second = (Engine(config, 2, clock, Log(9), name) for name in "ab")
    one, other = copy.deepcopy([first, second])
    assert one.clock is other.clock is not clock
    assert one.clock.tick(Reading(step=0), needs_step=True).run == 0
    assert (one.name, one.layers, one.config) == ("a", 2, config)


def test_times_are_measured_where_they_are_asked_for(host):
    made = host(timed=True, sparsity=0)
    made.engine.begin(Reading(step=0), (GRID,))
    made.engine.attend(0, *tensors(), lambda: time.sleep(0.02))
    assert made.log.rows()[0].ms >= 20


def test_a_precision_reaches_every_sparse_call(monkeypatch):
    host = Host(monkeypatch, precision="int8", rotate=True, refresh_every=4)
    first, again = host.forward(step=0, seed=1), host.forward(step=1, seed=1)
    assert {(call["precision"], call["rotate"]) for call in host.calls} == {("int8", True)}
    exact = Host(monkeypatch).forward(step=0, seed=1)
    for outs in (first, again):
        assert 0 < np.abs(outs[0] - exact[0]).max() < 0.1
