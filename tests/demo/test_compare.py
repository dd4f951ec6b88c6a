import numpy as np
import pytest
from PIL import Image

import rainfusion
from rainfusion.core.errors import UnknownBackendError
from rainfusion.core.layout import TokenLayout
from rainfusion.demo import decode, features, picture, style
from rainfusion.demo.compare import Comparison, compare, settle

GRID = (7, 8, 12)


def compared(frames, grid, policy, *, heads=1, text=0, block=32, rounds=1, **settings) -> Comparison:
    q, k, v = features.qkv(frames, grid, heads=heads, text=text)
    problem = rainfusion.AttentionProblem.from_tensors(q, k, v)
    where = {name: settings.pop(name, None) for name in ("backend", "dtype")}
    setting = settle(problem, TokenLayout(grid, text=text, block=block), policy, **where)
    return compare(q, k, v, setting, rounds=rounds, **settings)


@pytest.fixture(scope="module")
def frames():
    return decode.load("bigbuckbunny", GRID)


@pytest.fixture(scope="module")
def found(frames):
    return compared(frames, GRID, rainfusion.TopK(0.6), heads=2, text=9)


def test_a_real_clip_is_compared(found):
    assert found.density == pytest.approx(0.4, abs=0.001)
    assert found.rounds == 1
    assert found.device.type == "cpu"
    assert found.plan.problem.dtype == "float32"
    for variant in found.variants.values():
        assert 0 < variant.relative_l1 < 0.5
        assert 0.9 < variant.cosine < 1
        assert variant.time_ratio == pytest.approx(variant.seconds / found.dense_seconds)


def test_the_window_order_keeps_more_than_raster_and_random(found):
    means = {name: values.mean() for name, values in vars(found.recall).items()}
    assert means["random"] < means["raster"] < means["plan"] < means["oracle"]


def test_the_first_frame_has_no_error(found):
    assert found.errors["drop"].shape == (7 * 8 * 12 + 9,)
    assert np.all(found.errors["drop"][: 8 * 12] < 1e-5)


def test_rounds_fit_into_the_time(frames):
    steps = []
    quick = compared(
        frames, GRID, rainfusion.TopP(0.5), rounds=None, seconds=0, progress=steps.append, backend="reference"
    )
    assert quick.rounds == 2
    assert quick.backend == "reference"
    assert len(steps) == 3


def test_half_precision_on_request(frames):
    pytest.importorskip("torch")
    found = compared(frames, GRID, rainfusion.TopK(0.5), dtype="bfloat16")
    assert found.plan.problem.dtype == "bfloat16"
    assert found.variants["drop"].cosine > 0.9


def test_an_unknown_backend_is_refused():
    with pytest.raises(UnknownBackendError):
        settle(rainfusion.AttentionProblem(1, 1, 672, 672, 64), TokenLayout(GRID), rainfusion.TopK(0.1), backend="none")


def test_the_policy_stays_beside_the_plan(found):
    assert found.policy == rainfusion.TopK(0.6)


@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_the_picture_is_drawn(tmp_path, frames, found, omitted):
    path = tmp_path / "new" / "demo.png"
    picture.draw(path, "bigbuckbunny", frames, found, omitted)
    with Image.open(path) as image:
        assert image.width == 1800
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000


def test_text_at_the_start_and_a_last_frame_are_drawn_too(tmp_path, frames):
    q, k, v = features.qkv(frames, GRID, heads=1, text=9, text_position="start")
    layout = TokenLayout(GRID, 9, "start", block=32, sink=("first_frame_keys", "last_frame"))
    problem = rainfusion.AttentionProblem.from_tensors(q, k, v)
    found = compare(q, k, v, settle(problem, layout, rainfusion.TopK(0.4), backend="reference"), rounds=1)
    error = found.errors["drop"]
    assert np.all(error[:9] < 1e-5)
    assert np.all(error[-8 * 12 :] < 1e-5)
    assert error[9 : 9 + 8 * 12].mean() > 1e-3
    picture.draw(tmp_path / "demo.png", "bigbuckbunny", frames, found)


def test_one_frame_is_drawn_too(tmp_path):
    grid = (1, 16, 16)
    frames = decode.load("carphone", grid)
    found = compared(frames, grid, rainfusion.TopK(0.5), block=16)
    picture.draw(tmp_path / "image.png", "carphone", frames, found)


def test_a_file_that_cannot_be_written(tmp_path, frames, found):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(style.PictureError, match="cannot be written"):
        picture.draw(tmp_path / "file" / "demo.png", "bunny", frames, found)


def test_matplotlib_is_missing(tmp_path, monkeypatch, frames, found):
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    with pytest.raises(style.PictureError, match=r"pip install 'rainfusion\[demo\]'"):
        picture.draw(tmp_path / "demo.png", "bunny", frames, found)
