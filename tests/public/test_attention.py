"""rainfusion.attention on NumPy arrays and torch tensors: what goes in, what comes out, what stays as it was."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

import rainfusion
from rainfusion import BlockMask, Fixed, TokenLayout, TopK, TopP
from rainfusion.core.errors import MaskError

CLIP = {"grid": (5, 8, 12), "text": 30, "block": (32, 16), "sparsity": 0.5}  # 510 tokens, both sides ragged
LENGTH = 510

pytestmark = pytest.mark.filterwarnings("ignore::rainfusion.core.errors.SparsityWarning")


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(5)
    return [rng.standard_normal((2, heads, LENGTH, 16), dtype=np.float32) for heads in (4, 2, 2)]


@pytest.fixture(params=["reference", None], ids=["reference", "automatic"])
def backend(request):
    return request.param


def test_output_lse_and_mask_are_those_of_masked_attention(naive, qkv, backend):
    out, lse, mask = rainfusion.attention(*qkv, **CLIP, return_lse=True, return_mask=True, backend=backend)
    layout = TokenLayout(CLIP["grid"], CLIP["text"], block=CLIP["block"])
    expected, expected_lse = naive(*qkv, mask.to_dense(layout))
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-5)
    pairs = mask.blocks.shape[2] * mask.blocks.shape[3]
    assert abs(mask.sparsity - 0.5) <= 0.5 / pairs + 1e-12
    assert not np.array_equal(mask.blocks[0], mask.blocks[1]), "every sample selects for itself"


def test_sparsity_zero_is_dense_attention(naive, qkv, backend):
    out, mask = rainfusion.attention(*qkv, **CLIP | {"sparsity": 0}, return_mask=True, backend=backend)
    np.testing.assert_allclose(out, naive(*qkv, True)[0], atol=2e-5)
    assert mask.density == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_results_are_of_the_kind_and_dtype_of_the_inputs(qkv, kind, dtype, backend):
    if kind == "numpy":
        inputs = [x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for x in qkv]
    else:
        inputs = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in qkv]
    out, lse, mask = rainfusion.attention(*inputs, **CLIP, return_lse=True, return_mask=True, backend=backend)
    assert type(out) is type(lse) is type(mask.blocks) is type(inputs[0])
    assert (out.dtype, tuple(out.shape)) == (inputs[0].dtype, (2, 4, LENGTH, 16))
    assert str(lse.dtype).endswith("float64" if dtype == "float64" else "float32")
    assert tuple(lse.shape) == (2, 4, LENGTH)
    again = rainfusion.attention(*inputs, **CLIP, return_lse=True, return_mask=True, backend=backend)
    for one, other in zip(again[:2], (out, lse), strict=True):
        assert np.asarray(one == other).all(), "one call is like the other"


def test_numpy_and_torch_give_the_same_numbers(qkv):
    ours = rainfusion.attention(*qkv, **CLIP, backend="reference")
    theirs = rainfusion.attention(*(torch.from_numpy(x) for x in qkv), **CLIP, backend="reference")
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_bshd_is_bhsd_with_axes_swapped(qkv, kind, omitted, backend):
    arguments = CLIP | {"return_lse": True, "return_mask": True, "omitted": omitted, "backend": backend}
    out, lse, mask = rainfusion.attention(*(kind(x) for x in qkv), **arguments)
    swapped = [kind(np.ascontiguousarray(np.swapaxes(x, 1, 2))) for x in qkv]
    out_s, lse_s, mask_s = rainfusion.attention(*swapped, **arguments, tensor_layout="bshd")
    assert tuple(out_s.shape) == (2, LENGTH, 4, 16)
    np.testing.assert_allclose(np.swapaxes(np.asarray(out_s), 1, 2), out, atol=1e-6)
    np.testing.assert_allclose(lse_s, lse, rtol=1e-6)
    np.testing.assert_array_equal(mask_s.blocks, mask.blocks)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_exactly_what_is_asked_for_is_returned(qkv, lse, mask, sparsity):
    result = rainfusion.attention(*qkv, **CLIP | {"sparsity": sparsity}, return_lse=lse, return_mask=mask)
    kinds = [np.ndarray] * (1 + lse) + [BlockMask] * mask
    assert [type(x) for x in (result if isinstance(result, tuple) else [result])] == kinds


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("omitted", ["drop", "summary"])
def test_a_reused_mask_reproduces_the_output(qkv, kind, omitted, backend):
    """Bit for bit on the reference; others may group rows otherwise where the counts are not known beforehand."""
    allowed = 0 if backend == "reference" else 1e-6
    inputs = [kind(x) for x in qkv]
    given = {key: value for key, value in CLIP.items() if key != "sparsity"} | {"omitted": omitted, "backend": backend}
    out, mask = rainfusion.attention(*inputs, **given, sparsity=0.5, return_mask=True)
    reused, same = rainfusion.attention(*inputs, **given, mask=mask, return_mask=True)
    assert same is mask
    np.testing.assert_allclose(np.asarray(reused), np.asarray(out), rtol=0, atol=allowed)
    named = rainfusion.attention(*inputs, **given, mask=mask, policy=Fixed())
    np.testing.assert_array_equal(np.asarray(named), np.asarray(reused))


def test_a_mask_moved_between_libraries_serves_there(qkv):
    given = {key: value for key, value in CLIP.items() if key != "sparsity"} | {"backend": "reference"}
    out, mask = rainfusion.attention(*qkv, **given, sparsity=0.5, return_mask=True)
    tensors = [torch.from_numpy(x) for x in qkv]
    np.testing.assert_array_equal(rainfusion.attention(*tensors, **given, mask=mask.like(tensors[0])), out)


def test_writing_into_a_returned_mask_changes_no_later_call(qkv):
    for _ in range(2):
        _, mask = rainfusion.attention(*qkv, **CLIP | {"sparsity": 0}, return_mask=True, backend="reference")
        assert mask.density == 1
        mask.blocks[...] = False


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_inputs_of_any_strides_serve_and_stay_as_they_were(qkv, kind, backend):
    padded = [np.zeros((*x.shape[:-1], 40), np.float32) for x in qkv]
    for x, home in zip(qkv, padded, strict=True):
        home[..., 3:35:2] = x
    homes = [kind(home) for home in padded]
    inputs = [home[..., 3:35:2] for home in homes]
    before = [np.asarray(home).copy() for home in homes]
    out, _ = rainfusion.attention(*inputs, **CLIP, omitted="summary", return_mask=True, backend=backend)
    expected = rainfusion.attention(*qkv, **CLIP, omitted="summary", backend=backend)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    for home, kept in zip(homes, before, strict=True):
        np.testing.assert_array_equal(np.asarray(home), kept)


def test_reversed_views_serve(qkv):
    backwards = [np.ascontiguousarray(x[:, :, :, ::-1])[:, :, :, ::-1] for x in qkv]
    assert all(x.strides[-1] < 0 for x in backwards)
    out = rainfusion.attention(*backwards, **CLIP, backend="reference")
    np.testing.assert_allclose(out, rainfusion.attention(*qkv, **CLIP, backend="reference"), atol=1e-6)


def test_read_only_and_one_and_the_same_array_serve(naive, qkv, backend):
    x = qkv[1].copy()
    x.flags.writeable = False
    out, mask = rainfusion.attention(x, x, x, **CLIP, return_mask=True, backend=backend)
    layout = TokenLayout(CLIP["grid"], CLIP["text"], block=CLIP["block"])
    np.testing.assert_allclose(out, naive(x, x, x, mask.to_dense(layout))[0], atol=2e-5)


def test_parameters_serve_where_no_gradient_is_asked_for(qkv, backend):
    inputs = [torch.nn.Parameter(torch.from_numpy(x)) for x in qkv]
    with pytest.raises(rainfusion.core.errors.ProblemError, match=r"requires a gradient.*no_grad"):
        rainfusion.attention(*inputs, **CLIP, backend=backend)
    with torch.no_grad():
        out = rainfusion.attention(*inputs, **CLIP, backend=backend)
    assert not out.requires_grad
    np.testing.assert_allclose(out, rainfusion.attention(*qkv, **CLIP, backend=backend), atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "text"),
    [((1, 1, 1), 0), ((1, 1, 1), 3), ((1, 13, 17), 0), ((2, 3, 5), 7), ((3, 1, 211), 0), (None, 0)],
    ids=str,
)
def test_any_grid_works(naive, rng, grid, text, backend):
    """One token, one frame, two frames, sides below the window, prime sizes, no grid: with default blocks."""
    length = np.prod(grid or 300) + text
    q, k, v = (rng.standard_normal((1, 2, length, 8)) for _ in range(3))
    out, mask = rainfusion.attention(q, k, v, grid=grid, text=text, sparsity=0.9, return_mask=True, backend=backend)
    layout = TokenLayout(grid, text, block=(128, 128))
    np.testing.assert_allclose(out, naive(q, k, v, mask.to_dense(layout))[0], atol=1e-9)


def test_cross_attention_orders_the_side_that_has_the_grid(naive, rng, backend):
    q, k, v = (rng.standard_normal((2, 2, n, 8)) for n in (480, 77, 77))
    arguments = {"grid": (5, 8, 12), "block": 16, "sparsity": 0.4, "return_mask": True, "backend": backend}
    out, mask = rainfusion.attention(q, k, v, **arguments)
    np.testing.assert_allclose(out, naive(q, k, v, mask.to_dense(TokenLayout((5, 8, 12), block=16)))[0], atol=1e-9)
    assert mask.blocks[:, :, -6:].all(), "the first frame's rows are dense"


@pytest.mark.parametrize("policy", [TopK(0.4), TopK(0.4, counting="paper"), TopP(0.7, floor=0.2)], ids=str)
def test_a_policy_replaces_sparsity(naive, qkv, policy, backend):
    given = {key: value for key, value in CLIP.items() if key != "sparsity"}
    out, mask = rainfusion.attention(*qkv, **given, policy=policy, return_mask=True, backend=backend)
    layout = TokenLayout(CLIP["grid"], CLIP["text"], block=CLIP["block"])
    np.testing.assert_allclose(out, naive(*qkv, mask.to_dense(layout))[0], atol=2e-5)
    assert 0 < mask.density < 1


def test_scale_window_and_sink_reach_the_plan(naive, qkv, backend):
    given = CLIP | {"scale": 0.7, "window": (2, 2, 8), "sink": None, "text_position": "start"}
    out, mask = rainfusion.attention(*qkv, **given, return_mask=True, backend=backend)
    layout = TokenLayout((5, 8, 12), 30, "start", (2, 2, 8), (32, 16), None)
    np.testing.assert_allclose(out, naive(*qkv, mask.to_dense(layout), 0.7)[0], atol=2e-5)


def test_a_mask_made_for_another_grid_is_refused():
    q = np.random.default_rng(0).standard_normal((1, 1, 6 * 8 * 4, 8), np.float32)
    how = {"block": 16, "sink": None, "backend": "reference"}
    _, mask = rainfusion.attention(q, q, q, grid=(6, 8, 4), sparsity=0.5, return_mask=True, **how)
    rainfusion.attention(q, q, q, grid=(6, 8, 4), mask=mask, **how)
    for other in ({"grid": (6, 4, 8)}, {}):
        with pytest.raises(MaskError, match="made for grid 6x8x4"):
            rainfusion.attention(q, q, q, mask=mask, **how, **other)
