"""The functions of MindIE-SD that order tokens and select blocks, on the CPU, beside ours with ``counting="paper"``.

They are the code published with RainFusion2.0, so they say what the paper's counting is. Where they are not well
defined, a test shows what they do; docs/ascend.md has the table.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mindiesd.layers.flash_attn import sparse_flash_attn_rf_v2 as theirs

import rainfusion
from rainfusion import Grid, Text, TokenLayout, Tokens
from rainfusion.core.policies import TopK

BLOCK = 128
CLEAR = 1e-5  # scores closer than this may change places by rounding


def mask_of_theirs(q, k, grid, sparsity, text=0, **how):
    """Their mask, bool ``[B, H, blocks, blocks]`` in their order of blocks: first frame, video, text."""
    pooled = theirs.do_tensor_rearrange_pooling(q, k, k, text, BLOCK, grid, grid, "BNSD")[-1]
    given = pooled, text, sparsity, q.shape[-1] ** -0.5, BLOCK, grid, grid, "BNSD"
    return theirs.get_blockwise_mask(*given, return_binary=True, **how).bool()


def order_of_theirs(grid, text=0):
    """Which token of the sequence, text first, stands where in their order."""
    numbers = torch.arange(text + math.prod(grid), dtype=torch.float64)[None, None, :, None]
    moved = theirs.do_tensor_rearrange_pooling(numbers, numbers, numbers, text, BLOCK, grid, grid, "BNSD")[0]
    return moved.flatten().long()


def random(length, heads=2, dim=32, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((1, heads, length, dim), generator=generator).to(dtype) for _ in range(2)]


def assert_same(ours, wanted, q, k, quota):
    """Equal in every row whose last kept and first skipped score are further apart than rounding."""
    rows = ours.shape[2]
    means = [torch.stack([part.double().mean(2) for part in x.split(BLOCK, dim=2)], dim=2) for x in (q, k)]
    score = (means[0] @ means[1].mT * q.shape[-1] ** -0.5).sort(dim=-1, descending=True).values
    clear = torch.ones(score.shape[:3], dtype=torch.bool)
    if quota < rows:
        clear = score[..., quota - 1] - score[..., quota] > CLEAR
    assert clear.float().mean() > 0.9
    assert torch.equal(ours[clear], wanted[clear])


@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.5, 0.8, 0.97])
@pytest.mark.parametrize(
    ("grid", "text"),
    [
        ((4, 16, 32), 0),  # whole windows, whole blocks
        ((3, 8, 48), 128),
        ((5, 16, 24), 200),  # three windows a row: their blocks reach from one row into the next
        ((4, 16, 20), 64),  # ragged, and the first frame ends inside a block
        ((3, 10, 64), 77),  # ragged, and the text ends in part of a block
    ],
    ids=str,
)
def test_the_selection_is_theirs_in_their_order(grid, text, sparsity):
    """Their token order, our selection: whatever the grid, wherever the first frame is whole blocks."""
    video = math.prod(grid)
    assert video % BLOCK == 0  # or text would begin inside a block
    first = -(-grid[1] * grid[2] // BLOCK) * BLOCK
    q, k = random(video + text)
    wanted = mask_of_theirs(q, k, grid, sparsity, text)
    # Their order with the first frame moved to the end, before the text, which is where ours has what is protected.
    order = order_of_theirs(grid, text)
    moved = torch.cat([order[first:video], order[:first], order[video:]])
    q, k = (x[:, :, moved] for x in (q, k))
    layout = (Tokens(video - first), Text(first + text))
    ours = rainfusion.select(q, k, parts=layout, policy=TopK(sparsity, "paper"), backend="reference")
    rows = torch.arange(wanted.shape[-1])
    blocks = torch.cat([rows[first // BLOCK : video // BLOCK], rows[: first // BLOCK], rows[video // BLOCK :]])
    quota = math.ceil((1 - sparsity) * len(rows))
    assert_same(torch.as_tensor(ours.blocks), wanted[:, :, blocks][..., blocks], q, k, quota)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("grid", [(4, 8, 16), (7, 16, 16), (3, 48, 16)], ids=str)
@pytest.mark.parametrize("text", [0, 128, 300])
def test_from_tokens_to_mask_where_the_orders_agree(grid, text, sparsity):
    """With windows of 1x8x16 on a grid 16 wide, both put the same tokens into the same blocks."""
    video, first = math.prod(grid), grid[1] * grid[2]
    q, k = random(text + video, seed=1)
    wanted = mask_of_theirs(q, k, grid, sparsity, text)
    parts = (Text(text), Grid(*grid, window=(1, 8, 16))) if text else (Grid(*grid, window=(1, 8, 16)),)
    layout = TokenLayout(parts=parts)
    ours = rainfusion.select(q, k, parts=parts, policy=TopK(sparsity, "paper"), backend="reference")
    in_theirs, in_ours = order_of_theirs(grid, text), torch.from_numpy(layout.order.copy())
    place = {frozenset(tokens.tolist()): i for i, tokens in enumerate(in_ours.split(BLOCK))}
    blocks = torch.tensor([place[frozenset(tokens.tolist())] for tokens in in_theirs.split(BLOCK)])
    assert first % BLOCK == 0
    q, k = (x[:, :, in_theirs] for x in (q, k))
    quota = math.ceil((1 - sparsity) * len(blocks))
    assert_same(torch.as_tensor(ours.blocks)[:, :, blocks][..., blocks], wanted, q, k, quota)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("clips", [[(3, 16, 24), (2, 8, 48)], [(4, 16, 16)], [(3, 10, 20), (4, 9, 24)]], ids=str)
def test_the_selection_is_theirs_for_several_clips_in_their_order(clips, sparsity):
    """Clips between other tokens, which they attend in full; wherever the last, ragged block is one of these."""
    starts = [20 + i * 90 + sum(map(math.prod, clips[:i])) for i in range(len(clips))]
    length = starts[-1] + math.prod(clips[-1]) + 100
    spans = [{"start": start, "latent_shape": clip} for start, clip in zip(starts, clips, strict=True)]
    q, k = random(length, seed=3)
    q_moved, k_moved, _, pooled, _, context, first_frames = theirs.do_multi_span_tensor_rearrange_pooling(
        q, k, k, spans, BLOCK, "BNSD"
    )
    wanted = theirs.get_multi_span_blockwise_mask(
        pooled, sparsity, q.shape[-1] ** -0.5, context, first_frames, "BNSD", return_binary=True
    ).bool()
    kept = sorted(context | first_frames)
    assert kept[-1] == wanted.shape[-1] - 1
    blocks = [b for b in range(wanted.shape[-1]) if b not in kept] + kept
    keys = torch.arange(length).split(BLOCK)
    order = torch.cat([keys[b] for b in blocks])
    q, k = (x[:, :, order] for x in (q_moved, k_moved))
    protected = sum(len(keys[b]) for b in kept)
    parts = (Tokens(length - protected), Text(protected))
    ours = rainfusion.select(q, k, parts=parts, policy=TopK(sparsity, "paper"), backend="reference")
    quota = math.ceil((1 - sparsity) * len(blocks))
    assert_same(torch.as_tensor(ours.blocks), wanted[:, :, blocks][..., blocks], q, k, quota)


def test_means_of_blocks_are_theirs():
    (x, _) = random(3 * BLOCK + 40, seed=2)
    ours = rainfusion.block_means(x, sparsity=0.0, backend="reference")
    torch.testing.assert_close(torch.as_tensor(ours), theirs.avgpool(x), rtol=1e-5, atol=1e-6)


# -- what is not well defined there: one test a row of the table in docs/ascend.md ------------------------------------


def test_nominal_sparsity_is_not_what_is_skipped():
    grid = (4, 16, 16)
    q, k = random(math.prod(grid))
    nominal = mask_of_theirs(q, k, grid, 0.75)
    assert 1 - nominal.float().mean() == pytest.approx(0.4375)
    realised = rainfusion.select(q, k, grid=grid, window=(1, 8, 16), sparsity=0.5, backend="reference")
    assert realised.density == pytest.approx(0.5)


def test_ties_keep_more_than_k():
    grid = (5, 8, 16)
    q, k = (torch.ones((1, 1, math.prod(grid), 32)) for _ in range(2))
    assert mask_of_theirs(q, k, grid, 0.8, protect_first_frame=False).all()
    ours = rainfusion.select(q, k, grid=grid, sink=None, window=(1, 8, 16), sparsity=0.8, backend="reference")
    assert (np.asarray(ours.blocks).sum(-1) == 1).all()


def test_sixteen_bit_scores_make_ties():
    """Their means and scores have the tensors' dtype; ours are float32 on every backend."""
    grid = (8, 32, 32)
    q, k = random(math.prod(grid), dtype=torch.bfloat16)
    theirs_kept = mask_of_theirs(q, k, grid, 0.8, protect_first_frame=False).sum(-1)
    k_blocks = math.ceil(0.2 * 64)
    assert (theirs_kept > k_blocks).any()
    ours = rainfusion.select(q, k, grid=grid, sink=None, sparsity=0.8, backend="reference")
    assert np.asarray(ours.blocks).sum() == round(0.2 * 64 * 64) * 2


def test_text_that_begins_inside_a_block_is_protected_in_part_there():
    grid, text = (3, 10, 10), 100  # text is at 300 to 399, in the blocks 2 and 3
    q, k = random(text + math.prod(grid))
    kept = mask_of_theirs(q, k, grid, 0.7, text)
    assert kept[:, :, 3].all()
    assert not kept[:, :, 2].all()
    parts = (Text(text), Grid(*grid))
    ours = rainfusion.select(q, k, parts=parts, sparsity=0.1, backend="reference")
    at = TokenLayout(parts=parts).inverse[:text] // BLOCK
    assert np.asarray(ours.blocks)[:, :, at].all()


def test_one_frame_is_dense_there():
    grid = (1, 16, 32)
    q, k = random(math.prod(grid))
    assert mask_of_theirs(q, k, grid, 0.8).all()
    ours = rainfusion.select(q, k, grid=grid, sparsity=0.5, backend="reference")
    assert ours.density == pytest.approx(0.5)


def test_one_ragged_frame_is_an_error_there():
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        order_of_theirs((1, 9, 20))
    assert TokenLayout((1, 9, 20)).length == 180


def test_the_first_frame_of_a_ragged_grid_is_not_cut_into_windows_there():
    grid = (2, 16, 20)
    assert torch.equal(order_of_theirs(grid)[:320], torch.arange(320))
    assert not torch.equal(order_of_theirs((2, 16, 16))[:256], torch.arange(256))


def test_ragged_windows_share_blocks_with_other_frames_there():
    """Whole windows of a frame, then its remainder, then the next frame: blocks reach across frames."""
    frames = order_of_theirs((3, 10, 20)).split(BLOCK)
    assert any(len({int(token) // 200 for token in block}) > 1 for block in frames[2:])
    ours = TokenLayout((3, 10, 20), window=(1, 8, 16)).order
    whole = torch.from_numpy(ours[: 2 * BLOCK].copy()).split(BLOCK)
    assert all(len({int(token) // 200 for token in block}) == 1 for block in whole)


def test_the_lists_are_those_of_the_first_sample():
    grid = (3, 8, 16)
    q, k = (torch.cat([x, -x]) for x in random(math.prod(grid))[:1] * 2)
    pooled = theirs.do_tensor_rearrange_pooling(q, k, k, 0, BLOCK, grid, grid, "BNSD")[-1]
    select_idx, count = theirs.get_blockwise_mask(pooled, 0, 0.5, 0.1, BLOCK, grid, grid, "BNSD")
    assert select_idx.shape == (3, 2, 3)  # of two samples
    assert count.shape == (3, 2)
