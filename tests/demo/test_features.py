import numpy as np
import pytest

from rainfusion.core.errors import ProblemError
from rainfusion.demo import features

GRID = (3, 4, 6)


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (3, 4 * 8, 6 * 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("head_dim", [2, 24, 64, 128])
@pytest.mark.parametrize("text", [0, 5])
def test_shapes_and_dtype(frames, head_dim, text):
    for x in features.qkv(frames, GRID, heads=3, head_dim=head_dim, text=text):
        assert x.shape == (1, 3, 72 + text, head_dim)
        assert x.dtype == np.float32
        assert np.isfinite(x).all()


def test_the_seed_decides_everything(frames):
    first, again, other = (features.qkv(frames, GRID, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_heads_rise_in_sharpness(frames):
    q, k, _ = features.qkv(frames, GRID, heads=4)
    own = (q * k).sum(axis=-1).mean(axis=-1)[0] * 64**-0.5
    assert np.all(np.diff(own) > 0)
    assert own[0] == pytest.approx(4, rel=0.05)
    assert own[-1] == pytest.approx(16, rel=0.05)


def test_text_stands_where_it_is_said_to_and_the_video_keeps_its_place(frames):
    angles = features.rotary_angles(GRID, 24, 5, "start")
    assert not angles[:5].any()
    assert np.array_equal(angles[5:], features.rotary_angles(GRID, 24))
    assert np.array_equal(features.rotary_angles(GRID, 24, 5)[:72], angles[5:])


def test_rotary_products_depend_on_the_distance_alone():
    angles = features.rotary_angles((4, 4, 4), 24)
    a, b = np.random.default_rng(0).standard_normal((2, 1, 24))
    rotated_a, rotated_b = (features.rotate(np.repeat(x, 64, axis=0), angles) for x in (a, b))
    products = rotated_a @ rotated_b.T
    place = np.arange(64).reshape(4, 4, 4)
    assert products[place[0, 0, 0], place[1, 2, 1]] == pytest.approx(products[place[2, 1, 2], place[3, 3, 3]], rel=1e-5)


def test_patches_hold_the_pixels_of_one_token(frames):
    tiles = features.patches(frames, GRID)
    assert tiles.shape == (72, 8 * 8 * 3)
    assert np.array_equal(tiles[(1 * 4 + 2) * 6 + 3], frames[1, 16:24, 24:32].ravel().astype(np.float32) / 255)


def test_principal_components_are_those_of_the_svd():
    x = np.random.default_rng(0).standard_normal((50, 7)) * np.arange(1, 8)
    found = features.principal_components(x, 3)
    left, values, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    assert np.allclose(np.abs(found), np.abs(left * values)[:, :3])


def test_an_odd_head_dim_is_refused(frames):
    with pytest.raises(ProblemError, match="head_dim=25 is odd"):
        features.qkv(frames, GRID, head_dim=25)


def test_tensors_that_no_machine_can_hold_are_refused(frames):
    with pytest.raises(ProblemError, match=r"Q, K and V of 72 tokens and 999999999 heads of 64 take .* at most 32 GiB"):
        features.qkv(frames, GRID, heads=999_999_999)
