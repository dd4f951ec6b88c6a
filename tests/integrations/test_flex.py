"""FlexAttention's block masks: the same attention, and the same mask back, or a refusal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import rainfusion
from rainfusion import BlockMask, TokenLayout
from rainfusion.core.errors import MaskError
from rainfusion.integrations.flex_attention import from_flex, to_flex


@st.composite
def masks(draw):
    """Masks with ragged tails, unequal blocks and different rows for every batch and head."""
    block = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    q_len, kv_len = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), -(-q_len // block[0]), -(-kv_len // block[1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = rng.random(shape) < rng.random()
    return BlockMask(torch.from_numpy(blocks), q_len, kv_len, block)


@settings(max_examples=60)
@given(masks())
def test_a_mask_comes_back_and_is_what_torch_itself_would_make(mask):
    flex = to_flex(mask)
    assert tuple(flex.shape) == (*mask.blocks.shape[:2], mask.q_len, mask.kv_len)
    assert torch.equal(flex.to_dense().bool(), mask.blocks)
    back = from_flex(flex, mask.q_len, mask.kv_len)
    assert torch.equal(back.blocks, mask.blocks)
    assert (back.q_len, back.kv_len, back.block) == (mask.q_len, mask.kv_len, mask.block)
    batch, heads = mask.blocks.shape[:2]
    made = create_block_mask(flex.mask_mod, batch, heads, mask.q_len, mask.kv_len, "cpu", mask.block)
    for ours, theirs in ((flex.kv_num_blocks, made.kv_num_blocks), (flex.full_kv_num_blocks, made.full_kv_num_blocks)):
        assert torch.equal(ours, theirs)
    assert torch.equal(from_flex(made, mask.q_len, mask.kv_len).blocks, mask.blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy mask", "torch mask"])
def test_flex_attention_in_block_order_is_rainfusion_attention(rng, kind):
    layout = TokenLayout((3, 5, 9), text=7, block=(16, 8), sink=None)
    q, k, v = (rng.standard_normal((2, heads, layout.length, 8)) for heads in (4, 2, 2))
    out, mask = rainfusion.attention(
        *map(kind, (q, k, v)),
        grid=(3, 5, 9),
        text=7,
        block=(16, 8),
        sink=None,
        sparsity=0.5,
        return_mask=True,
        backend="reference",
    )
    ordered = (torch.from_numpy(x[:, :, layout.order]) for x in (q, k, v))
    theirs = flex_attention(*ordered, block_mask=to_flex(mask), enable_gqa=True)
    np.testing.assert_allclose(theirs.numpy()[:, :, layout.inverse], out, atol=1e-12)


def test_one_batch_and_head_are_repeated():
    flex = create_block_mask(lambda b, h, q, kv: q // 8 == kv // 8, None, None, 30, 30, "cpu", 8)
    mask = from_flex(flex, 30, 30, batch=2, heads=3)
    assert torch.equal(mask.blocks, torch.eye(4, dtype=torch.bool).expand(2, 3, 4, 4))
    with pytest.raises(MaskError, match=r"batch 2 and 3 heads cannot be repeated to \(2, 4, 4, 4\)"):
        from_flex(to_flex(mask), 30, 30, heads=4)


def test_rows_that_keep_nothing_are_kept_so():
    flex = create_block_mask(lambda b, h, q, kv: (q < 8) & (kv < 8), None, None, 32, 32, "cpu", 8)
    mask = from_flex(flex, 32, 32)
    assert mask.counts.tolist() == [[[1, 0, 0, 0]]]
    assert torch.equal(to_flex(mask).to_dense().bool(), mask.blocks)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_a_part_of_a_mask_and_an_unpacked_one_are_taken(rng):
    """Views of a grid, and a block of keys of which some rows keep nothing: output 0 there."""
    grid = torch.from_numpy(rng.random((1, 2, 4, 6)) < 0.4)
    grid[0, 1, 2] = False
    mask = BlockMask(grid, 30, 44, (8, 8)).packed().unpacked()[..., 2:]
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 2, n, 8))) for n in (30, 28, 28))
    out = flex_attention(q, k, v, block_mask=to_flex(mask))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense())
    torch.testing.assert_close(out, dense.nan_to_num(0.0))
    assert not out[0, 1, 16:24].any()


def test_a_mask_function_that_reads_tensors_is_run_on_the_partial_blocks():
    document = torch.arange(32) // 16
    flex = create_block_mask(lambda b, h, q, kv: document[q] == document[kv], None, None, 30, 30, "cpu", 8)
    assert from_flex(flex, 30, 30).blocks[0, 0].int().tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2


def causal(b, h, q, kv):
    return q >= kv


ONES = torch.ones(1, 1, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "lengths", "said"),
    [
        (
            lambda: create_block_mask(causal, None, None, 32, 32, "cpu", 8),
            (32, 32),
            r"4 block\(s\) in part.*column\] \[0, 0, 0, 0\]",
        ),
        (lambda: create_block_mask(causal, None, None, 32, 32, "cpu", 8), (40, 32), r"need \(batch, heads, 5\)"),
        (lambda: create_block_mask(causal, None, None, 32, 32, "cpu", 8), (32, 16), r"outside \[0, 2\)"),
        (
            lambda: FlexMask.from_kv_blocks(ONES, ONES[..., None] * 9, BLOCK_SIZE=8, compute_q_blocks=False),
            (32, 32),
            r"an index lies outside \[0, 4\)",
        ),
    ],
)
def test_what_is_no_block_mask_is_refused(make, lengths, said):
    with pytest.raises(MaskError, match=said):
        from_flex(make(), *lengths)
