"""Calibration without a host: errors of heads that were built to differ, budgets, files, configurations."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

import rainfusion
from rainfusion import Grid
from rainfusion.integrations.calibration import Calibration, Checked, ErrorTable
from rainfusion.integrations.clock import Clock, Reading
from rainfusion.integrations.config import ConfigError, RainFusionConfig
from rainfusion.integrations.engine import Engine
from rainfusion.integrations.head_budgets import Binding, CalibrationError, HeadBudgets, ModelBudgets
from rainfusion.integrations.measure import Budgeted, HeadErrors, OneLayer, squares
from rainfusion.integrations.progress import Bar
from rainfusion.integrations.report import Log
from rainfusion.integrations.schedule import Schedule

BLOCK, BLOCKS, LAYERS, HEADS = 16, 8, 2, 2
TOKENS = BLOCK * BLOCKS
GRID = Grid(2, 8, 8)
SHARES = (0.25, 0.5, 0.75)
PEAKED, DIFFUSE = 0, 1


def config(**other):
    return RainFusionConfig(
        **{"sparsity": 0.5, "block": BLOCK, "min_blocks": 0, "sink": None, "backend": "reference"} | other
    )


def engine(settings=None):
    settings = settings or config()
    return Engine(settings, LAYERS, Clock(), Log(100), "model")


def tensors(seed=0):
    """A head whose queries attend to their own block alone, and one that attends to all blocks, which differ."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.eye(BLOCKS, dtype=np.float32), BLOCK, axis=0)
    q = 0.01 * rng.standard_normal((1, TOKENS, HEADS, BLOCKS), dtype=np.float32)
    k, v = q.copy(), rng.standard_normal((1, TOKENS, HEADS, BLOCKS), dtype=np.float32)
    q[0, :, PEAKED], k[0, :, PEAKED] = 10 * codes, 10 * codes
    v[0, :, DIFFUSE] += np.repeat(rng.standard_normal((BLOCKS, BLOCKS), dtype=np.float32), BLOCK, axis=0)
    return q, k, v


def dense(q, k, v):
    return rainfusion.attention(q, k, v, block=BLOCK, sparsity=0, tensor_layout="bshd", backend="reference")


def forward(made, qkv, step=0):
    """A forward of two layers, tokens in block order; its outputs."""
    made.begin(Reading(None, step, 8), (GRID,), order="given")
    outputs = [made.attend(layer, *qkv, lambda: dense(*qkv)) for layer in range(LAYERS)]
    made.end()
    return outputs


def binding(**other):
    known = {"model": "Model", "digest": "abc", "layers": LAYERS, "heads": HEADS, "grids": ("2x8x8",)}
    blocks = {"block": (BLOCK, BLOCK), "window": None, "sink": (), "omitted": "drop"}
    return Binding(**known | blocks | other)


def table(name="model", weights=(1.0, 1.0), **other):
    """What was measured of the built heads."""
    made, qkv = engine(), tensors()
    made.probe = errors = HeadErrors(SHARES, 0.5)
    forward(made, qkv)
    found = tuple(tuple(map(tuple, layer)) for layer in errors.read(LAYERS, SHARES))
    return ErrorTable(name, binding(), SHARES, found, weights, errors.calls, **other)


def calibration(**other):
    return Calibration((table(),), 0.5, **other)


# -- measuring -----------------------------------------------------------------------------------------


def test_errors_are_those_of_each_head_over_the_layers_norm():
    made, qkv = engine(), tensors()
    made.probe = errors = HeadErrors(SHARES, 0.5)
    outputs = forward(made, qkv)
    exact = dense(*qkv).astype(np.float64)
    np.testing.assert_array_equal(outputs[0], dense(*qkv))  # the model goes on with the host's own
    read = np.array(errors.read(LAYERS, SHARES))
    for s, share in enumerate(SHARES):
        sparse = rainfusion.attention(
            *qkv, parts=(replace(GRID, sink=None),), order="given", block=BLOCK, sparsity=share, tensor_layout="bshd",
            backend="reference",
        )  # fmt: skip
        expected = ((sparse - exact) ** 2).sum(axis=(0, 1, 3)) / (exact**2).sum()
        np.testing.assert_allclose(read[0, :, s], expected, rtol=1e-4, atol=1e-9)
    assert (errors.calls, errors.heads, list(errors.grids)) == (LAYERS, HEADS, ["2x8x8"])
    assert read[0, PEAKED, -1] < 1e-6 < read[0, DIFFUSE, 0]


def test_steps_between_are_not_measured():
    made = engine()
    made.probe = errors = HeadErrors((0.5,), 0.5, every=3)
    for step in range(7):
        forward(made, tensors(step), step)
    assert errors.calls == 3 * LAYERS


def test_all_shares_have_one_executable(monkeypatch):
    asked = []
    attention = rainfusion.attention
    monkeypatch.setattr(rainfusion, "attention", lambda *a, **given: asked.append(given) or attention(*a, **given))
    made, qkv = engine(), tensors()
    made.probe = HeadErrors(SHARES, 0.5)
    forward(made, qkv)
    of_engine = [given for given in asked if "parts" in given]
    assert len(of_engine) == LAYERS * len(SHARES)
    assert all("quotas" in given for given in of_engine)
    assert len({id(given["quotas"]) for given in of_engine}) == len(SHARES)  # kept from layer to layer


def test_padding_takes_no_part():
    rng = np.random.default_rng(0)
    x, less = (rng.standard_normal((2, 5, 3, 4), dtype=np.float32) for _ in range(2))
    valid = np.array([[True] * 5, [True, True, False, False, True]])
    expected = (((x - less) ** 2) * valid[:, :, None, None]).sum(axis=(0, 1, 3))
    np.testing.assert_allclose(squares(x, less, valid), expected, rtol=1e-5)
    np.testing.assert_allclose(
        squares(x, less[:, 2:], None), ((x[:, 2:] - less[:, 2:]) ** 2).sum(axis=(0, 1, 3)), rtol=1e-5
    )


def test_large_tensors_are_summed_in_pieces(monkeypatch):
    x = np.random.default_rng(0).standard_normal((1, 10, 2, 4), dtype=np.float32)
    whole = squares(x, None, None)
    monkeypatch.setattr("rainfusion.integrations.measure._MOST_VALUES", 24)
    np.testing.assert_allclose(squares(x, None, None), whole, rtol=1e-6)


def test_padded_keys_are_left_out_of_the_sums():
    made, (q, k, v) = engine(), tensors()
    lengths = np.array([TOKENS - BLOCK], dtype=np.int32)
    made.probe = errors = HeadErrors((0.5,), 0.5)
    exact = dense(q, k, v)
    exact[:, -BLOCK:] = 1e6  # what the host gives for padding is of no interest
    made.begin(Reading(), (GRID,), order="given")
    made.attend(0, q, k, v, lambda: exact, kv_lengths=lengths)
    made.end()
    assert 0 < errors.read(1, (0.5,))[0][DIFFUSE][0] < 1


@pytest.mark.filterwarnings("ignore:sparsity=.* cannot be reached:rainfusion.SparsityWarning")
def test_shares_that_cannot_be_reached_are_noted_and_the_needed_one_is_refused():
    made = engine()
    made.probe = errors = HeadErrors((0.5, 0.95), 0.5)  # of 8 blocks, one stays
    forward(made, tensors())
    assert errors.unreached == {0.95}
    made.probe = HeadErrors((0.5,), 0.95)
    with pytest.raises(CalibrationError, match=r"sparsity=0\.95 cannot be reached on .*; ask for less"):
        forward(made, tensors())


def test_ranks_must_divide_the_heads():
    made = engine()
    made.probe = HeadErrors((0.5,), 0.5, ranks=3)
    with pytest.raises(CalibrationError, match="ranks=3 does not divide the 2 heads"):
        forward(made, tensors())


def test_numbers_that_are_not_finite_are_refused():
    made, (q, k, v) = engine(), tensors()
    v[0, 0] = math.nan
    made.probe = errors = HeadErrors((0.5,), 0.5)
    forward(made, (q, k, v))
    with pytest.raises(CalibrationError, match="the attention of layer 0 gave numbers that are not finite"):
        errors.read(LAYERS, (0.5,))


def test_one_layer_is_sparse_and_the_others_are_the_hosts():
    made, qkv = engine(), tensors()
    made.probe = one = OneLayer(1, 0.5)
    outputs = forward(made, qkv)
    np.testing.assert_array_equal(outputs[0], dense(*qkv))
    assert not np.array_equal(outputs[1], dense(*qkv))
    error = ((outputs[1] - dense(*qkv)) ** 2).sum() / (dense(*qkv) ** 2).sum()
    assert one.read() == pytest.approx(error, rel=1e-4)
    assert OneLayer(0, 0.5).read() == 0


# -- budgets -------------------------------------------------------------------------------------------


def test_the_diffuse_head_skips_less_and_the_mean_is_exact():
    budgets = calibration().budget().models[0]
    for layer in budgets.shares:
        assert layer == (0.75, 0.25)
    assert budgets.sparsity == 0.5


def test_budgets_realise_the_mean_share_and_err_less_than_one_share():
    budgets, qkv = calibration().budget(), tensors()
    own = config(sparsity=budgets).for_model("model", "Model", "abc", LAYERS)
    errors = {}
    for name, settings in (("uniform", config()), ("budgets", own)):
        made = engine(settings)
        errors[name] = sum(float(((out - dense(*qkv)) ** 2).sum()) for out in forward(made, qkv))
        assert [row.density for row in made.log.rows()] == [0.5] * LAYERS
    assert errors["budgets"] < 0.7 * errors["uniform"]


def test_the_table_predicts_what_is_measured_of_its_layers():
    one, qkv = table(), tensors()
    shares = one.budget(0.5, 1).shares
    made = engine()
    made.probe = Budgeted(shares)
    exact = dense(*qkv)
    measured = sum(((out - exact) ** 2).sum() / (exact**2).sum() for out in forward(made, qkv))
    assert one.predicted(shares) == pytest.approx(float(measured), rel=1e-3)
    assert one.predicted(one.uniform(0.0)) == 0


def test_layers_that_reach_the_output_skip_less():
    heavy = Calibration((table(weights=(10.0, 0.1)),), 0.5).budget().models[0].shares
    assert sum(heavy[0]) < sum(heavy[1])


def test_layers_that_were_dense_stay_dense():
    one = table()
    made = replace(one, errors=(None, one.errors[1]))
    budgets = made.budget(0.5, 1)
    assert budgets.shares == ((0.0, 0.0), (0.75, 0.25))
    assert budgets.sparsity == 0.25  # the dense layer counted in
    assert made.uniform(0.5) == ((0.0, 0.0), (0.5, 0.5))


def test_ranks_share_a_budget():
    shares = calibration().budget(ranks=2).models[0].shares
    assert all(len({*layer}) == 1 for layer in shares)
    assert calibration(ranks=2).budget().models[0].shares == shares


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sparsity": 0.8}, r"sparsity=0\.8 of model is more than 0\.75, the largest share that was measured"),
        ({"sparsity": 1.0}, r"sparsity=1\.0 is out of range"),
        ({"ranks": 3}, "ranks=3 does not divide the 2 heads of model"),
        ({"ranks": 0}, "ranks=0 is not allowed"),
    ],
)
def test_budgets_that_cannot_be_are_refused(asked, said):
    with pytest.raises(CalibrationError, match=said):
        calibration().budget(**asked)


# -- in a configuration --------------------------------------------------------------------------------


def test_a_configuration_takes_a_calibration_or_budgets_and_is_json_both_ways():
    given = calibration()
    made = config(sparsity=given, sparsity_from_step={4: given.budget(0.25)})
    assert made.sparsity == given.budget()
    assert made.head_budgets() == {"sparsity": given.budget(), "sparsity_from_step[4]": given.budget(0.25)}
    assert RainFusionConfig.from_json(made.to_json()) == made
    assert hash(RainFusionConfig.from_json(made.to_json())) == hash(made)
    assert config(sparsity=given.budget()).head_budgets() == {"sparsity": given.budget()}
    assert hash(given.budget()) == hash(calibration().budget())


def test_a_models_own_configuration_has_its_shares():
    budgets = calibration().budget()
    own = config(sparsity=budgets, sparsity_from_step={4: 0.9}).for_model("Model", "Model", "abc", LAYERS)
    assert own == config(sparsity={0: (0.75, 0.25), 1: (0.75, 0.25)}, sparsity_from_step={4: 0.9})
    assert config().for_model("Model", "Other", "", 99) == config()
    stepped = config(sparsity_from_step={4: budgets}).for_model("Model", "Model", "abc", LAYERS)
    assert stepped.sparsity_from_step[4] == own.sparsity


@pytest.mark.parametrize(
    ("identity", "other", "said"),
    [
        (
            ("Other", "abc", LAYERS),
            {},
            "in sparsity do not fit Model: this is Other, and they were made for Model; calibrate this one",
        ),
        (("Model", "xyz", LAYERS), {}, r"for a Model of another configuration \(abc, not xyz\)"),
        (("Model", "abc", 3), {}, "this model has 3 layers, and they were made for 2"),
        (("Model", "abc", LAYERS), {"block": 32}, r"block=\(16, 16\), not \(32, 32\); give what"),
        (("Model", "abc", LAYERS), {"sink": "first_frame"}, r"sink=None, not \('first_frame',\)"),
        (("Model", "abc", LAYERS), {"window": (1, 4, 4)}, r"window=None, not \(1, 4, 4\)"),
    ],
)
def test_another_model_or_other_blocks_are_refused(identity, other, said):
    with pytest.raises(ConfigError, match=said):
        config(sparsity=calibration(), **other).for_model("Model", *identity)


def test_a_sink_is_the_same_in_any_order():
    one, other = ("first_frame", "last_frame"), ("last_frame", "first_frame")
    made = replace(calibration().tables[0].binding, sink=one)
    assert made.mismatch(made.block, made.window, other) == ""
    assert replace(made, sink=other) == made


def test_an_unknown_name_among_several_models_is_refused():
    two = Calibration((table("transformer"), table("transformer_2")), 0.5)
    own = config(sparsity=two).for_model("transformer_2", "Model", "abc", LAYERS)
    assert own.sparsity[0] == (0.75, 0.25)
    with pytest.raises(
        ConfigError, match="budgets of transformer, transformer_2, and none is of 'Model'; apply them to the pipeline"
    ):
        config(sparsity=two).for_model("Model", "Model", "abc", LAYERS)


@pytest.mark.parametrize(
    ("measured", "asked", "fits"),
    [
        ("transformer", "transformer", True),
        ("transformer", "Model", True),
        ("transformer", "Model 1", True),
        ("Model", "transformer", True),
        ("transformer_2", "transformer", False),
    ],
)
def test_one_models_budgets_serve_under_the_name_of_its_class(measured, asked, fits):
    budgets = Calibration((table(measured),), 0.5).budget()
    if fits:
        assert budgets.of(asked) is budgets.models[0]
    else:
        with pytest.raises(CalibrationError, match="budgets of transformer_2, and none is of 'transformer'"):
            budgets.of(asked)


def test_a_schedule_does_not_take_budgets_of_no_model():
    with pytest.raises(ConfigError, match="head budgets are bound to a model"):
        Schedule(config(sparsity=calibration()), LAYERS)


# -- files ---------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written(tmp_path):
    checked = Checked(0.2, 0.1, 0.5, 1, 4)
    made = Calibration((table("one", checked=checked), table("two")), 0.5, prompts=3)
    made.save(tmp_path / "a.json")
    assert Calibration.load(tmp_path / "a.json") == made


JUNK = {
    "nothing": b"",
    "no JSON": b"\x00\xff\xfe",
    "deep": b"[" * 100_000,
    "a long number": b"9" * 10_000,
    "a list": b"[]",
    "another object": b"{}",
}


@pytest.mark.parametrize("content", JUNK.values(), ids=JUNK.keys())
def test_junk_is_refused(tmp_path, content):
    path = tmp_path / "junk.json"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"is not a calibration \(.*write one with Calibration.save"):
        Calibration.load(path)


def test_large_files_folders_and_paths_that_are_none_are_refused(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**24 + 1)
    for path, said in ((tmp_path / "large", "larger than"), (tmp_path, "not a regular file"), (3, "not the path")):
        with pytest.raises(CalibrationError, match=said):
            Calibration.load(path)
    with pytest.raises(CalibrationError, match="not the path"):
        calibration().save(3)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none")


def changed(path, value):
    """The JSON of a calibration in which one value is another."""
    record = json.loads(calibration(prompts=1).to_json())
    *way, last = path
    inner = record
    for step in way:
        inner = inner[step]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(record)


TABLE = ("tables", 0)
WRONG = [
    (("version",), 2, "calibration format 2; this rainfusion reads 1 to 1"),
    (("version",), True, "calibration format True"),
    (("extra",), 1, "unexpected keyword argument 'extra'"),
    (("tables",), [], "models are named"),
    (("tables",), {}, "tables is {}; give a list of 0 to 16"),
    (("tables",), [3], "tables=3 is not an object with names"),
    (("sparsity",), 1.5, r"sparsity=1\.5 is out of range"),
    (("ranks",), 0, "ranks=0 is not allowed"),
    ((*TABLE, "name"), "a\nb", "name='a.*is not a text"),
    ((*TABLE, "name"), KeyError, "missing 1 required positional argument: 'name'"),
    ((*TABLE, "shares"), [0.5, 0.25, 0.75], "do not ascend from above 0"),
    ((*TABLE, "shares"), [0.0, 0.25, 0.75], "do not ascend from above 0"),
    ((*TABLE, "shares"), [0.5], "errors has 3 items; give a list of 1"),
    ((*TABLE, "errors"), [None, None], "no layer of model was measured"),
    ((*TABLE, "errors"), [None], "errors has 1 items; give a list of 2"),
    ((*TABLE, "errors", 0, 0, 0), -1, "errors=-1 is out of range; give a number from 0 to 1e"),
    ((*TABLE, "errors", 0, 0, 0), math.nan, "errors=nan is not a finite number"),
    ((*TABLE, "errors", 0, 0, 0), 1e300, "errors=1e.300 is out of range"),
    ((*TABLE, "errors", 0, 0, 0), "much", "errors='much' is not a finite number"),
    ((*TABLE, "weights", 0), None, "weights=None is not a finite number"),
    ((*TABLE, "checked"), 3, "checked=3 is not an object"),
    ((*TABLE, "calls"), -3, "calls=-3 is not allowed"),
    ((*TABLE, "binding"), None, "binding=None is not an object"),
    ((*TABLE, "binding", "layers"), 0, "layers=0 is not allowed"),
    ((*TABLE, "binding", "heads"), 10**6, "2 layers of 1000000 heads are more than 262144 heads in all"),
    ((*TABLE, "binding", "digest"), "x" * 300, "digest=.*is not a text of at most 200"),
    ((*TABLE, "binding", "sink"), ["middle"], "sink='middle' is not known"),
    ((*TABLE, "binding", "block"), [16], r"block=\[16\] is not a tuple of 2"),
    ((*TABLE, "binding", "omitted"), "zero", "omitted='zero' is not known"),
]


@pytest.mark.parametrize(("path", "value", "said"), WRONG, ids=[f"{p[-1]} {str(v)[:20]}" for p, v, _ in WRONG])
def test_every_field_of_a_file_is_checked(path, value, said):
    with pytest.raises(CalibrationError, match=said) as caught:
        Calibration.from_json(changed(path, value))
    assert len(str(caught.value)) < 500


def test_every_field_of_budgets_in_a_configuration_is_checked():
    record = json.loads(config(sparsity=calibration()).to_json())
    assert RainFusionConfig.of(record).sparsity == calibration().budget()
    record["sparsity"]["models"][0]["shares"][0][0] = 1.0
    with pytest.raises(ConfigError, match=r"sparsity: shares=1\.0 is out of range"):
        RainFusionConfig.of(record)
    record["sparsity"]["models"] = []
    with pytest.raises(ConfigError, match="sparsity: models are named"):
        RainFusionConfig.of(record)


def test_models_of_one_name_and_shares_of_another_number_are_refused():
    one = calibration().budget().models[0]
    with pytest.raises(CalibrationError, match="each under a name of its own"):
        HeadBudgets((one, one), 0.5)
    with pytest.raises(CalibrationError, match="shares has 1 items; give a list of 2"):
        ModelBudgets("model", one.binding, ((0.5, 0.5),))


# -- shown ---------------------------------------------------------------------------------------------


def test_a_table_and_words():
    one = table(checked=Checked(0.2, 0.1, 0.5, 1, 4))
    made = Calibration((replace(one, errors=(None, one.errors[1])),), 0.5)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(made.table(0.25))
    lines = console.export_text().splitlines()
    assert lines[0].startswith("mean share 0.25, 1 rank")
    assert "dense" in lines[2]
    assert "0.250" in lines[3]
    assert made.said() == (
        "model: 2 attention calls of Model measured on 2x8x8; squared relative error of its output at a mean share of "
        "0.5, 4 forwards: 0.2 with one share, 0.1 with budgets, 0.500 times"
    )
    assert "not checked" in calibration().said()
    facts = made.summary()["models"]["model"]
    assert facts["checked"]["budgets"] == 0.1
    assert 0 < facts["predicted"]["budgets"] < facts["predicted"]["uniform"]


def test_a_bar_without_rich_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ConfigError, match="needs rich: pip install rich, or give progress=False"):
        Bar(True)
    with Bar(False) as bar:
        bar.begin("nothing", 3)
        bar.at(1)
        bar.advance()


def test_a_bar_shows_one_stage_at_a_time(capsys):
    with Bar(True) as bar:
        bar.begin("first", 2)
        bar.at(1)
        bar.begin("second", 2)
        bar.advance()
        bar.advance()
    assert "second" in (shown := capsys.readouterr().err)
    assert "first" not in shown.splitlines()[-1]
