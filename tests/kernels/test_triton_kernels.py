"""Each kernel against the semantics, on small problems of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rainfusion.backends.triton import chip
from rainfusion.backends.triton.attend_blocks import attend_blocks
from rainfusion.backends.triton.configs import AttendConfig
from rainfusion.backends.triton.fold_blocks import fold_blocks
from rainfusion.backends.triton.operands import Attention, Means
from rainfusion.backends.triton.schedule import heavy_first, heavy_first_on_device
from rainfusion.backends.triton.score_blocks import score_blocks
from rainfusion.backends.triton.select_blocks import BlockLists, Wanted, list_blocks, select_top_k, select_top_p
from rainfusion.core import semantics
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.policy import TopK, TopP, spread

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SMALL = AttendConfig(16, 16, 4, 1)
FEW = settings(max_examples=15)


def random(seed: int, *shape: int) -> torch.Tensor:
    made: torch.Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE)


def masked(counts: torch.Tensor, indices: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The mask that lists describe; refuses lists that are not ascending."""
    grid = torch.zeros(like.shape, dtype=torch.bool).flatten(0, 2)
    for row, (count, listed) in enumerate(zip(counts.tolist(), indices.tolist(), strict=True)):
        assert listed[:count] == sorted(set(listed[:count]))
        grid[row, listed[:count]] = True
    return grid.view(like.shape)


@FEW
@given(
    length=st.integers(1, 70),
    block=st.sampled_from([1, 8, 16, 20]),
    dim=st.sampled_from([8, 24]),
    ordered=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_and_their_means(length: int, block: int, dim: int, ordered: bool, seed: int) -> None:
    x = random(seed, 2, 3, length, dim)
    order = torch.randperm(length, device=DEVICE) if ordered else None
    made = fold_blocks(
        x.transpose(1, 2).contiguous().transpose(1, 2),  # strides as a model's, heads next to channels
        None if order is None else order.int(),
        block,
        copy=True,
        mean=True,
        half_mean=True,
    )
    walked = x if order is None else x[:, :, order]
    assert torch.equal(made.tokens[:, :, :length], walked)
    assert not made.tokens[:, :, length:].any()
    expected = semantics.block_mean(x, order, block=block)
    torch.testing.assert_close(made.mean, expected)
    torch.testing.assert_close(made.half_mean, expected)


def test_nothing_is_copied_that_is_not_needed() -> None:
    x = random(0, 1, 2, 40, 16)
    assert fold_blocks(x, None, 16, copy=False).tokens is x
    means_only = fold_blocks(x, None, 16, copy=False, mean=True)
    assert means_only.tokens is x
    assert means_only.half_mean is None


@FEW
@given(rows=st.integers(1, 70), columns=st.integers(1, 70), group=st.sampled_from([1, 2]), dim=st.sampled_from([8, 80]))
def test_scores(rows: int, columns: int, group: int, dim: int) -> None:
    qb, kb = random(1, 2, 2 * group, rows + 1, dim), random(2, 2, 2, columns, dim)
    made = score_blocks(qb, kb, 0.3, rows, chip.precision(torch.device(DEVICE)))
    torch.testing.assert_close(made, semantics.block_score(qb[:, :, :rows], kb, scale=0.3), rtol=1e-5, atol=1e-5)


def scores(seed: int, rows: int, columns: int, kind: str) -> torch.Tensor:
    if kind == "ties":
        made = torch.randint(-2, 2, (1, 2, rows, columns), generator=torch.Generator().manual_seed(seed)).float()
        made[made == 0] = -0.0  # equal to 0, though its bits are not
        return made.to(DEVICE)
    made = random(seed, 1, 2, rows, columns)
    if kind == "strange":
        made[..., ::3], made[..., 1::5], made[..., 2::7] = float("nan"), float("-inf"), float("inf")
    return made


@settings(max_examples=40)
@given(data=st.data())
def test_exactly_k_ties_to_the_lower_index(data: st.DataObject) -> None:
    axis = _axis(data)
    rows, free_rows = 4, data.draw(st.integers(1, 4))
    quotas = spread(data.draw(st.integers(0, free_rows * axis.free_blocks)), free_rows)
    score = scores(data.draw(st.integers(0, 99)), free_rows, axis.blocks, data.draw(st.sampled_from(["plain", "ties"])))
    device_quotas = torch.tensor(quotas, dtype=torch.int32, device=DEVICE)
    lists = select_top_k(score, device_quotas, rows, axis, Wanted(mask=True, bias=True))
    policy = type("Quotas", (TopK,), {"row_quotas": lambda self, q, kv: quotas})(0.5)
    _check_lists(lists, score, policy, axis, rows)


@settings(max_examples=40)
@given(data=st.data())
def test_least_set_of_a_share_of_the_mass(data: st.DataObject) -> None:
    axis = _axis(data)
    kind = data.draw(st.sampled_from(["plain", "strange"]))
    policy = TopP(data.draw(st.floats(0.05, 0.99)), data.draw(st.sampled_from([0.0, 0.3])))
    score = scores(data.draw(st.integers(0, 99)), 3, axis.blocks, kind)
    _check_lists(select_top_p(score, policy, 4, axis, Wanted(mask=True, bias=True)), score, policy, axis, 4)


def _axis(data: st.DataObject) -> BlockedAxis:
    length, protected = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 40))
    return BlockedAxis(length, 16, True, max(length - protected, 0))


def _check_lists(lists: BlockLists, score: torch.Tensor, policy: Any, axis: BlockedAxis, rows: int) -> None:
    q = BlockedAxis(rows * 16, 16, True, score.shape[2] * 16)
    padded = torch.nn.functional.pad(score, (0, 0, 0, rows - score.shape[2])).cpu().numpy()
    expected = torch.from_numpy(semantics.select(padded, policy=policy, q=q, kv=axis))
    assert lists.mask is not None
    assert torch.equal(lists.mask.cpu(), expected)
    assert torch.equal(masked(lists.counts, lists.indices, expected), expected)
    weights = torch.tensor(np.log2(axis.counts), dtype=torch.float32).expand(expected.shape)
    assert lists.bias is not None
    bias = lists.bias.cpu().view(*expected.shape[:3], -1)
    torch.testing.assert_close(bias[..., : axis.blocks], weights.masked_fill(expected, float("-inf")))
    assert (bias[..., axis.blocks :] == float("-inf")).all()


@FEW
@given(rows=st.integers(1, 4), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_lists_of_a_given_mask(rows: int, columns: int, seed: int) -> None:
    mask = random(seed, 2, 2, columns, rows).transpose(2, 3) > 0  # not contiguous
    axis = BlockedAxis(columns * 16, 16, False, columns * 16)
    lists = list_blocks(mask, axis, Wanted())
    assert torch.equal(masked(lists.counts, lists.indices, mask.cpu()), mask.cpu())


@settings(max_examples=25)
@given(data=st.data())
def test_attention_over_listed_blocks(data: st.DataObject) -> None:
    q_block, kv_block = data.draw(st.sampled_from([(16, 16), (20, 16), (16, 40), (48, 16)]))
    q_len, kv_len = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 90))
    group, dim = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([8, 16, 24]))
    scale = data.draw(st.sampled_from([0.25, -0.2, 0.0]))
    means, gathers = data.draw(st.booleans()), data.draw(st.booleans())
    q, k, v = random(1, 2, 2 * group, q_len, dim), random(2, 2, 2, kv_len, dim), random(3, 2, 2, kv_len, dim)
    q_axis, kv_axis = BlockedAxis(q_len, q_block, False, q_len), BlockedAxis(kv_len, kv_block, False, kv_len)
    mask = random(4, 2, 2 * group, q_axis.blocks, kv_axis.blocks) > 0.3  # some rows keep nothing
    lists = list_blocks(mask, kv_axis, Wanted(bias=means))
    q_order, kv_order = (torch.randperm(n, device=DEVICE) if gathers else None for n in (q_len, kv_len))
    kb, vb = (semantics.block_mean(x, kv_order, block=kv_block) for x in (k, v))
    attention = Attention(
        q,
        k,
        v,
        q_len,
        kv_len,
        (q_block, kv_block),
        lists,
        heavy_first_on_device(lists.counts),
        scale,
        *(None if order is None else order.int() for order in (q_order, kv_order, q_order)),
        Means(kb.contiguous(), vb.contiguous()) if means else None,
    )
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan, device=DEVICE)
    attend_blocks(attention, out, lse, SMALL, chip.precision(torch.device(DEVICE)))
    orders, sides = (q_order, kv_order), {"block": (q_block, kv_block), "scale": scale}
    expected = semantics.attend(q, k, v, *orders, mask, **sides)
    if means:
        log_counts = torch.tensor(np.log(kv_axis.counts), dtype=torch.float32, device=DEVICE)
        rest = semantics.attend(q, kb, vb, q_order, None, ~mask, block=(q_block, 1), scale=scale, bias=log_counts)
        expected = semantics.merge(*expected, *rest)
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-5)


def test_heavy_rows_start_first_and_heads_stay_together() -> None:
    counts = np.array([3, 2, 40, 3])
    order = heavy_first(counts, 2, torch.device(DEVICE)).tolist()
    assert order == [2, 6, 0, 1, 3, 4, 5, 7]
    on_device = heavy_first_on_device(torch.tensor(np.tile(counts, 2), dtype=torch.int32, device=DEVICE))
    assert on_device.tolist() == order


@pytest.mark.parametrize(("length", "steps"), [(300, 1), (128 * 130, 2)])
def test_bias_comes_in_whole_steps(length: int, steps: int) -> None:
    axis = BlockedAxis(length, 128, False, length)
    mask = torch.ones(1, 1, 2, axis.blocks, dtype=torch.bool, device=DEVICE)
    bias = list_blocks(mask, axis, Wanted(bias=True)).bias
    assert bias is not None
    assert bias.shape == (2, 128 * steps)
