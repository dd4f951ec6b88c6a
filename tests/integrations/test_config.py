"""The configuration: JSON both ways, and a useful message for every value that is none."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rainfusion.core.errors import LayoutError, PolicyError
from rainfusion.integrations.config import ConfigError, RainFusionConfig

share = st.floats(0, 1, exclude_max=True)
shares = share | st.lists(share, min_size=1, max_size=4).map(tuple)
by_layer = shares | st.dictionaries(st.integers(0, 60), shares, max_size=4)
reuse = st.integers(1, 9).flatmap(
    lambda every: st.tuples(st.just(every), st.none() | st.floats(0, 9) if every > 1 else st.none())
)
configs = st.builds(
    lambda reuse, **settings: RainFusionConfig(refresh_every=reuse[0], reuse_drift=reuse[1], **settings),
    reuse=reuse,
    sparsity=by_layer,
    sparsity_from_step=st.dictionaries(st.integers(0, 60), by_layer, max_size=3),
    dense_steps=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    num_steps=st.none() | st.integers(1, 100),
    dense_layers=st.lists(st.integers(-60, 60), max_size=4).map(tuple),
    block=st.sampled_from([128, 16, (128, 64)]),
    window=st.none() | st.just((2, 8, 8)),
    sink=st.sampled_from(["auto", None, "first_frame", "last_frame_keys", ("first_frame", "last_frame")]),
    omitted=st.sampled_from(["drop", "summary"]),
    precision=st.sampled_from(["int8", "fp8"]),
    rotate=st.booleans(),
    share_masks=st.booleans(),
    order=st.sampled_from(["auto", "layer"]),
    min_blocks=st.none() | st.integers(0, 99),
    backend=st.none() | st.just("torch"),
    on_grad=st.sampled_from(["raise", "dense"]),
    report_rows=st.integers(0, 99),
    timed=st.booleans(),
)


@given(configs)
def test_a_configuration_survives_json_pickle_and_copies(config):
    for twin in (
        RainFusionConfig.from_json(config.to_json()),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert twin == config
        assert hash(twin) == hash(config)
        assert twin.to_json() == config.to_json()


@given(st.dictionaries(st.integers(0, 9), share, min_size=2))
def test_equal_configurations_have_one_hash(by_layer):
    turned = dict(reversed(by_layer.items()))
    one, other = RainFusionConfig(sparsity=by_layer), RainFusionConfig(sparsity=turned)
    assert one == other
    assert hash(one) == hash(other)


def test_json_written_by_hand():
    config = RainFusionConfig.from_json(
        '{"sparsity": {"3": 0.5}, "dense_steps": [2, 0], "sparsity_from_step": {"4": 0}}'
    )
    assert config == RainFusionConfig(sparsity={3: 0.5}, dense_steps=(2, 0), sparsity_from_step={4: 0.0})
    assert RainFusionConfig.from_json("{}") == RainFusionConfig()
    assert json.loads(config.to_json())["sparsity"] == {"3": 0.5}


def test_a_configuration_does_not_follow_what_it_was_made_of():
    given = {0: 0.5}
    config = RainFusionConfig(sparsity=given)
    given[1] = 0.9
    assert config == RainFusionConfig(sparsity={0: 0.5})
    with pytest.raises(TypeError):
        config.sparsity[1] = 0.9
    with pytest.raises(AttributeError):
        config.sparsity = 0.5


REFUSED = [
    ({"sparsity": 1.0}, r"sparsity=1.0 is out of range; give a number in \[0, 1\)"),
    ({"sparsity": float("nan")}, "not a finite number"),
    ({"sparsity": "much"}, "sparsity='much' is not a finite number"),
    ({"sparsity": True}, "not a finite number"),
    ({"sparsity": ()}, "names no head"),
    ({"sparsity": {0: 2}}, r"sparsity\[0\]: .*out of range"),
    ({"sparsity": {-1: 0.5}}, "a key of sparsity=-1 is not allowed; give a whole number from 0"),
    ({"sparsity": {"first": 0.5}}, "a key of sparsity='first' is not an integer"),
    ({"sparsity": {"²": 0.5}}, "is not an integer"),
    ({"sparsity": {"01": 0.5}}, "has the key '01'; write 1"),
    ({"sparsity": {"9" * 5000: 0.5}}, "is not an integer"),
    ({"sparsity_from_step": 0.5}, r"not a mapping; give \{10: 0.9\}"),
    ({"sparsity_from_step": {-1: 0.5}}, "a key of sparsity_from_step=-1"),
    ({"sparsity_from_step": {3: {0: -1}}}, r"sparsity_from_step\[3\]\[0\]: "),
    ({"dense_steps": 3}, r"dense_steps=3 is not \(steps at the start, steps at the end\)"),
    ({"dense_steps": (1, 2, 3)}, r"dense_steps=\(1, 2, 3\)"),
    ({"dense_steps": (1, -1)}, "dense_steps=-1 is not allowed; give a whole number from 0"),
    ({"dense_layers": 3}, "dense_layers=3 is not a tuple of layer numbers"),
    ({"dense_layers": (1.5,)}, "dense_layers=1.5 is not an integer"),
    ({"dense_layers": (True,)}, "dense_layers=True is not allowed"),
    ({"num_steps": 0}, "num_steps=0 is not"),
    ({"num_steps": True}, "num_steps=True is not"),
    ({"refresh_every": 0}, "refresh_every=0 is not"),
    ({"refresh_every": None}, "refresh_every=None is not"),
    ({"refresh_every": 2, "reuse_drift": -0.1}, "reuse_drift=-0.1 is below 0; give a number from 0, or None"),
    ({"refresh_every": 2, "reuse_drift": float("nan")}, "reuse_drift=nan is not a finite number"),
    ({"refresh_every": 2, "reuse_drift": True}, "reuse_drift=True is not a finite number"),
    ({"refresh_every": 2, "reuse_drift": "0.1"}, "reuse_drift='0.1' is not a finite number"),
    ({"reuse_drift": 0.1}, "reuse_drift=0.1 has no effect with refresh_every=1, .*; give refresh_every=8"),
    ({"min_blocks": -1}, "min_blocks=-1 is not"),
    ({"report_rows": -1}, "report_rows=-1 is not"),
    ({"report_rows": 2.5}, "report_rows=2.5 is not"),
    ({"block": 0}, "block=0 is not allowed"),
    ({"block": "large"}, "block='large' is not an integer"),
    ({"window": 5}, "window=5 is not a tuple of 3 whole numbers"),
    ({"window": (1, 2, 2)}, "do not fill whole blocks"),
    ({"sink": "middle_frame"}, "sink='middle_frame' is not known; choose one of 'first_frame'.*, 'auto'"),
    ({"sparsity": {"format": "", "tables": []}}, r"JSON of a calibration; give Calibration\.load"),
    ({"omitted": "zero"}, "omitted='zero' is not known; choose one of 'drop', 'summary'"),
    ({"precision": "int4"}, "precision='int4' is not known; choose one of None, 'int8', 'fp8'"),
    ({"precision": "fp8", "rotate": 1}, "rotate=1 is neither True nor False"),
    ({"rotate": True}, "rotate=True has no effect without a precision; give precision='int8' or 'fp8', too"),
    ({"order": "given"}, "order='given' is not known; choose one of 'auto', 'layer'"),
    ({"on_grad": "ignore"}, "on_grad='ignore' is not known; choose one of 'raise', 'dense'"),
    ({"share_masks": 1}, "share_masks=1 is neither True nor False"),
    ({"timed": "yes"}, "timed='yes' is neither True nor False"),
    ({"backend": 5}, "backend=5 is not the name of a backend"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[str(arguments)[:60] for arguments, _ in REFUSED])
def test_what_is_no_value_is_refused(arguments, said):
    with pytest.raises((ConfigError, LayoutError), match=said) as caught:
        RainFusionConfig(**arguments)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 500


def test_numbers_of_numpy_are_numbers():
    config = RainFusionConfig(block=np.int64(128), window=(np.int64(2), 8, 8), num_steps=np.int32(4))
    assert config == RainFusionConfig(block=128, window=(2, 8, 8), num_steps=4)
    assert hash(config) == hash(RainFusionConfig.from_json(config.to_json()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "this is not one: Expecting"),
        (None, "this is not one: the JSON object"),
        ("[1]", "this is a list"),
        ('{"sparsty": 0.5, "zeta": 1}', "'sparsty', 'zeta' is no argument of a configuration; choose from sparsity, "),
        ('{"sparsity": 2}', "out of range"),
        ('{"sparsity": 0.5, "sparsity": 0.6}', "a name is there twice"),
        ("[" * 100000 + "]" * 100000, "this is not one"),
        ('{"%s": 1}' % ("x" * 100000), "is no argument"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_configuration_is_refused(text, said):
    with pytest.raises(PolicyError, match=said):
        RainFusionConfig.from_json(text)


@pytest.mark.parametrize(
    ("frames", "sparsity", "sink"),
    [
        (21, 0.8, "first_frame"),  # its rows and columns take .093 of the pairs, of .2 that are kept
        (21, 0.85, None),
        (33, 0.85, "first_frame"),
        (33, 0.9, None),
        (21, (0.7, 0.9), "first_frame"),
        (21, {0: 0.5, 3: 0.9}, None),
        (1, 0.1, None),
    ],
)
def test_the_sink_is_left_out_where_it_takes_most_of_what_is_kept(frames, sparsity, sink):
    assert RainFusionConfig(sparsity=sparsity).sinks.of(frames) == sink


def test_a_later_sparsity_counts_for_the_sink_and_a_named_one_stays():
    assert RainFusionConfig(sparsity=0.5, sparsity_from_step={10: 0.9}).sinks.of(21) is None
    assert RainFusionConfig(sparsity=0.5, omitted="summary").sinks.of(21) is None
    assert RainFusionConfig(sparsity=0.9, sink="first_frame").sinks.of(21) == "first_frame"
