"""Each kernel against the definitions, on small problems of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from array_api_compat import array_namespace
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rainfusion.backends.triton import hardware
from rainfusion.backends.triton.attend_blocks import attend_blocks
from rainfusion.backends.triton.fold_blocks import fold_blocks
from rainfusion.backends.triton.operands import Attention, Means
from rainfusion.backends.triton.quantise_blocks import KEY_ORDER, quantise_blocks, statistics
from rainfusion.backends.triton.score_blocks import score_blocks
from rainfusion.backends.triton.select_blocks import (
    BlockLists,
    Extras,
    every_block,
    heavy_first,
    heavy_first_on_device,
    list_blocks,
    select_blocks,
)
from rainfusion.backends.triton.tuning import AttendConfig
from rainfusion.core.layout import BlockedAxis
from rainfusion.core.ops import Select, attend, attend_means, block_mean, block_score, merge, quantise
from rainfusion.core.ops.rounding import hadamard
from rainfusion.core.policies import spread

pytestmark = [pytest.mark.interpreter, pytest.mark.slow]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

E4M3_STEP, ODD = (32, 0.02) if DEVICE == "cuda" else (64, 0.2)
"""Between its largest numbers, and how often rounding may differ: where it would carry into the exponent, Triton's
interpreter is a step low.
"""

SMALL = AttendConfig(16, 16, 4, 1)
QUICK = settings(phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes in the interpreter
FEW = settings(QUICK, max_examples=15)


def random(seed: int, *shape: int) -> torch.Tensor:
    values: torch.Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE)


def lengths_of(batch: int, length: int, seed: int) -> torch.Tensor:
    """Valid tokens of each sample: any number, in part more or less than there can be."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, length + 3, (batch,), generator=generator).to(DEVICE, torch.int32)


def listed(lists: BlockLists, shape: torch.Size) -> torch.Tensor:
    """The mask that lists describe; refuses lists that are not ascending."""
    grid = torch.zeros(shape, dtype=torch.bool).flatten(0, 2)
    for row, (count, indices) in enumerate(zip(lists.counts.tolist(), lists.indices.tolist(), strict=True)):
        assert indices[:count] == sorted(set(indices[:count]))
        grid[row, indices[:count]] = True
    return grid.view(shape)


@FEW
@given(
    length=st.integers(1, 70),
    block=st.sampled_from([1, 8, 16, 20]),
    dim=st.sampled_from([8, 24]),
    ordered=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_and_their_means(length: int, block: int, dim: int, ordered: bool, padded: bool, seed: int) -> None:
    x = random(seed, 2, 3, length, dim)
    order = torch.randperm(length, device=DEVICE) if ordered else None
    lengths = lengths_of(2, length, seed) if padded else None
    walked = x if order is None else x[:, :, order]
    if lengths is not None:  # what padding holds is read nowhere
        padding = torch.arange(length, device=DEVICE) >= lengths[:, None]
        walked[padding[:, None].expand(-1, 3, -1)] = torch.nan
        x = walked if order is None else torch.empty_like(x).index_copy_(2, order, walked)
    folded = fold_blocks(
        x.transpose(1, 2).contiguous().transpose(1, 2),  # strides as a model's, heads next to channels
        None if order is None else order.int(),
        block,
        lengths,
        copy=True,
        mean=True,
        half_mean=True,
    )
    assert torch.equal(folded.tokens[:, :, :length], walked.nan_to_num(0.0))
    assert not folded.tokens[:, :, length:].any()
    expected = block_mean(x.double(), order, lengths, block=block).float()
    torch.testing.assert_close(folded.mean, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(folded.half_mean, expected, rtol=1e-5, atol=1e-6)


@settings(QUICK, max_examples=12)
@given(
    length=st.integers(1, 300),
    format=st.sampled_from(["int8", "e4m3"]),
    ordered=st.booleans(),
    padded=st.booleans(),
    rotated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_in_8_bits(length: int, format: str, ordered: bool, padded: bool, rotated: bool, seed: int) -> None:
    """Keys, with a scale a block, and values, with a scale a channel and transposed: those of the definition."""
    dim, dtype = 32, torch.int8 if format == "int8" else torch.float8_e4m3fn
    x = random(seed, 2, 3, length, dim) + random(seed + 1, 2, 3, 1, dim)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).to(DEVICE) if ordered else None
    lengths = lengths_of(2, length, seed) if padded else None
    walk = None if order is None else order.int()
    blocks = -(-length // 128)

    centre, _ = statistics(x, walk, lengths, spread=False)
    keys = quantise_blocks(x, walk, lengths, dtype, centre=centre, rotate=rotated, repeat_scale=True, mean=True)
    defined, centre_as_defined, scale = quantise(
        x, order, lengths, format=format, block=128, centred=True, rotated=rotated
    )
    torch.testing.assert_close(centre, centre_as_defined, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(keys.scale, scale[..., None].expand(-1, -1, -1, 64), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(keys.mean, block_mean(x, order, lengths, block=128), rtol=1e-4, atol=1e-5)
    numbers = keys.x.float().view(2, 3, blocks, 128, dim) * keys.scale[..., :1, None]
    numbers = numbers.view(2, 3, -1, dim)[:, :, :length]
    numbers = (hadamard(numbers, array_namespace(numbers)) if rotated else numbers) + centre[:, :, None]
    step, odd = (E4M3_STEP, ODD) if format == "e4m3" else (1, 0.02)
    _one_step_apart(numbers, defined, order, lengths, scale.max() * step, odd)

    centre, channels = statistics(x, walk, lengths, spread=True)
    values = quantise_blocks(
        x, walk, lengths, torch.float8_e4m3fn, centre=centre, channel_scale=channels, transpose=True
    )
    defined, _, scale = quantise(x, order, lengths, format="e4m3", centred=True)
    torch.testing.assert_close(channels, scale, rtol=1e-4, atol=1e-6)
    stored = values.x.float().view(2, 3, blocks, dim, 128).transpose(3, 4)
    tokens = torch.empty_like(stored)
    tokens[:, :, :, list(KEY_ORDER)] = stored
    numbers = tokens.reshape(2, 3, -1, dim)[:, :, :length] * channels[:, :, None] + centre[:, :, None]
    _one_step_apart(numbers, defined, order, lengths, scale.max() * E4M3_STEP, ODD)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [1e-38, 1e-40])
def test_numbers_too_small_for_a_scale_stay_small(dtype: torch.dtype, size: float) -> None:
    """One over their scale would be infinite, and times 0 NaN."""
    x = random(0, 1, 2, 130, 32) * size
    x[:, :, 7] = 0.0
    blocks = quantise_blocks(x, None, None, dtype)
    assert blocks.scale is not None
    numbers = blocks.x.float() * blocks.scale.repeat_interleave(128, 2)[..., None]
    assert not numbers[:, :, 7].any()
    assert float((numbers[:, :, :130] - x).abs().max()) < 5 * size
    centre, channels = statistics(x, None, None, spread=True)
    values = quantise_blocks(x, None, None, torch.float8_e4m3fn, centre=centre, channel_scale=channels)
    assert channels is not None
    assert float((values.x.float()[:, :, :130] * channels[:, :, None] + centre[:, :, None] - x).abs().max()) < 5 * size


def test_rotation_whatever_the_default_dtype() -> None:
    """A pipeline may have set it to bfloat16."""
    x = random(0, 1, 1, 128, 64)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = quantise_blocks(x, None, None, torch.int8, rotate=True)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = quantise_blocks(x, None, None, torch.int8, rotate=True)
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.scale, expected.scale)


def _one_step_apart(
    numbers: torch.Tensor, defined: torch.Tensor, order: Any, lengths: Any, step: torch.Tensor, odd: float
) -> None:
    """Rounded numbers in block order are the defined ones in the caller's, but for the odd half rounded elsewhere."""
    expected = defined if order is None else defined[:, :, order]
    if lengths is not None:
        valid = (torch.arange(numbers.shape[2], device=DEVICE) < lengths[:, None])[:, None, :, None]
        numbers, expected = (torch.where(valid, each, 0) for each in (numbers, expected))
    apart = (numbers - expected).abs()
    assert apart.max() <= 1.01 * step + 1e-5
    assert apart.mean() <= odd * step + 1e-5


def test_nothing_is_copied_that_is_not_needed() -> None:
    x = random(0, 1, 2, 40, 16)
    assert fold_blocks(x, None, 16, copy=False).tokens is x
    means_only = fold_blocks(x, None, 16, copy=False, mean=True)
    assert means_only.tokens is x
    assert means_only.half_mean is None


@FEW
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    group=st.sampled_from([1, 2]),
    dim=st.sampled_from([8, 80]),
    prior_heads=st.sampled_from([None, 0, 1, 2]),
)
def test_scores(rows: int, columns: int, group: int, dim: int, prior_heads: int | None) -> None:
    """All query blocks, or the first of them; with a prior for all heads, and with one for each."""
    heads = 2 * group
    qb, kb = random(1, 2, heads, rows + 1, dim), random(2, 2, 2, columns, dim)
    of_heads: dict[int | None, tuple[int, ...]] = {0: (), 1: (1,), 2: (heads,)}
    prior = None if prior_heads is None else random(3, *of_heads[prior_heads], rows + 1, columns)
    if prior is not None:
        prior[..., 0, 0] = torch.inf
    expected = block_score(qb.double(), kb.double(), prior, scale=0.3).float()
    precision = hardware.precision(torch.device(DEVICE))
    for wanted in (rows, rows + 1):
        score = score_blocks(qb, kb, 0.3, wanted, precision, prior)
        torch.testing.assert_close(score, expected[:, :, :wanted], rtol=1e-5, atol=1e-5)


def scores(seed: int, rows: int, columns: int, kind: str) -> torch.Tensor:
    if kind == "ties":
        tied = torch.randint(-2, 2, (2, 2, rows, columns), generator=torch.Generator().manual_seed(seed)).float()
        tied[tied == 0] = -0.0  # equal to 0, though its bits are not
        return tied.to(DEVICE)
    score = random(seed, 2, 2, rows, columns)
    if kind == "strange":
        score[..., ::3], score[..., 1::5], score[..., 2::7] = float("nan"), float("-inf"), float("inf")
    return score


ROWS = 4


@settings(QUICK, max_examples=25)
@given(data=st.data())
def test_exactly_k_ties_to_the_lower_index(data: st.DataObject) -> None:
    """The same quotas for all heads, or each head its own; beyond what there is they are cut."""
    q, kv = _axes(data)
    shares = [data.draw(st.floats(0, 1.2)) for _ in range(data.draw(st.sampled_from([1, 2])))]
    quotas = np.array([spread(round(share * q.free_blocks * kv.free_blocks), q.free_blocks) for share in shares])
    over = data.draw(st.sampled_from(["free", "all"]))
    _check(data, quotas, Select(score="%s", quotas="%n", mask="%m", q=q, kv=kv, over=over), ["plain", "ties"])


@settings(QUICK, max_examples=25)
@given(data=st.data())
def test_least_set_of_a_share_of_the_mass_and_a_quota(data: st.DataObject) -> None:
    q, kv = _axes(data)
    mass, over = data.draw(st.floats(0.05, 0.99)), data.draw(st.sampled_from(["free", "free", "all"]))
    quotas = np.full((1, q.free_blocks), data.draw(st.integers(0, 5)))
    op = Select(score="%s", quotas="%n", mask="%m", q=q, kv=kv, mass=mass, over=over)
    _check(data, quotas, op, ["plain", "strange"])


def _axes(data: st.DataObject) -> tuple[BlockedAxis, BlockedAxis]:
    length, protected = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 40))
    rows = ROWS * 16 if data.draw(st.booleans()) else 16 * data.draw(st.integers(1, ROWS))
    return BlockedAxis(ROWS * 16, 16, True, rows), BlockedAxis(length, 16, True, max(length - protected, 0))


def _check(data: st.DataObject, quotas: np.ndarray, op: Select, kinds: list[str]) -> None:
    """Lists, mask and bias against the definition: scores of all rows or of the free ones, with lengths or without."""
    seed, has_lengths = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    score = scores(seed, ROWS, op.kv.blocks, data.draw(st.sampled_from(kinds)))
    given_quotas = torch.tensor(quotas, dtype=torch.int32, device=DEVICE)
    lengths = lengths_of(2, op.kv.length, seed) if has_lengths else None
    expected = op.meaning(score, given_quotas, lengths)
    rows = data.draw(st.sampled_from([ROWS, op.q.free_blocks]))
    lists = select_blocks(score[:, :, :rows].contiguous(), given_quotas, lengths, op, Extras(mask=True, bias=True))
    assert lists.mask is not None
    assert torch.equal(lists.mask, expected)
    _check_lists(lists, expected, op.kv, lengths)


def _check_lists(lists: BlockLists, mask: torch.Tensor, kv: BlockedAxis, lengths: torch.Tensor | None) -> None:
    """Blocks without a valid token are not listed; the bias of omitted blocks is the log of their valid tokens."""
    tokens = torch.tensor(kv.counts).expand(mask.shape[0], 1, 1, -1)
    if lengths is not None:
        start = torch.arange(kv.blocks) * kv.block
        tokens = torch.minimum((lengths.cpu()[:, None, None, None] - start).clamp(min=0), tokens)
    mask = mask.cpu()
    assert torch.equal(listed(lists, mask.shape), mask & (tokens > 0))
    assert lists.bias is not None
    bias = lists.bias.cpu().view(*mask.shape[:3], -1)
    expected = tokens.float().log2().expand(mask.shape).masked_fill(mask, float("-inf"))
    torch.testing.assert_close(bias[..., : kv.blocks], expected)
    assert (bias[..., kv.blocks :] == float("-inf")).all()


@FEW
@given(rows=st.integers(1, 4), columns=st.integers(1, 40), padded=st.booleans(), seed=st.integers(0, 99))
def test_lists_of_a_given_mask(rows: int, columns: int, padded: bool, seed: int) -> None:
    mask = random(seed, 2, 2, columns, rows).transpose(2, 3) > 0  # not contiguous, some rows are empty
    axis = BlockedAxis(columns * 16 - 5, 16, False, columns * 16 - 5)
    lengths = lengths_of(2, axis.length, seed) if padded else None
    _check_lists(list_blocks(mask, lengths, axis, Extras(bias=True)), mask, axis, lengths)


@settings(QUICK, max_examples=25)
@given(data=st.data())
def test_attention_over_listed_blocks(data: st.DataObject) -> None:
    """Some rows keep nothing; with lengths, keys and in part queries beyond them take no part, whatever they hold."""
    q_block, kv_block = data.draw(st.sampled_from([(16, 16), (20, 16), (16, 40), (48, 16)]))
    q_len, kv_len = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 90))
    group, dim = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([8, 16, 24]))
    scale = data.draw(st.sampled_from([0.25, -0.2, 0.0]))
    reorders, padding = data.draw(st.booleans()), data.draw(st.sampled_from([None, "keys", "both"]))
    kind = data.draw(st.sampled_from(["mask", "means", "dense"]))
    if padding == "both":
        kv_len = q_len
    q, k, v = random(1, 2, 2 * group, q_len, dim), random(2, 2, 2, kv_len, dim), random(3, 2, 2, kv_len, dim)
    lengths = None if padding is None else lengths_of(2, kv_len, data.draw(st.integers(0, 99)))
    if lengths is not None:
        beyond = (torch.arange(kv_len, device=DEVICE) >= lengths[:, None])[:, None].expand(-1, 2, -1)
        k[beyond], v[beyond] = torch.nan, torch.inf
    q_axis, kv_axis = BlockedAxis(q_len, q_block, False, q_len), BlockedAxis(kv_len, kv_block, False, kv_len)
    mask = random(4, 2, 2 * group, q_axis.blocks, kv_axis.blocks) > 0.3
    if kind == "dense":
        mask, lists = torch.ones_like(mask), every_block(kv_axis.blocks, torch.device(DEVICE))
    else:
        lists = list_blocks(mask, lengths, kv_axis, Extras(bias=kind == "means"))
    inverse = torch.randperm(q_len, device=DEVICE) if reorders else None
    order = None if inverse is None else inverse.argsort()
    means = [block_mean(x, None, lengths, block=kv_block).contiguous() for x in (k, v)]
    attention = Attention(
        q if order is None else q[:, :, order],
        k,
        v,
        q_len,
        kv_len,
        (q_block, kv_block),
        lists,
        heavy_first(np.array([[1] * q_axis.blocks]), 2, 2 * group, torch.device(DEVICE)),
        scale,
        out_order=None if order is None else order.int(),
        means=Means(*means) if kind == "means" else None,
        lengths=lengths,
        lengths_on_queries=padding == "both",
    )
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan, device=DEVICE)
    attend_blocks(attention, out, lse, SMALL, hardware.precision(torch.device(DEVICE)))
    arguments: dict[str, Any] = {"block": (q_block, kv_block), "scale": scale}
    q, k, v, *means = (x.double() for x in (q, k, v, *means))
    arguments["q_lengths"] = lengths if padding == "both" else None
    expected = attend(q, k, v, (order, inverse), None, mask, lengths, **arguments)
    if kind == "means":
        rest = attend_means(q, *means, mask, (order, inverse), lengths, kv_len=kv_len, **arguments)
        expected = merge(*expected, *rest)
    torch.testing.assert_close(out, expected[0].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected[1].float(), rtol=1e-4, atol=1e-5)


def test_heavy_rows_start_first_and_heads_stay_together() -> None:
    counts = np.array([[3, 2, 40, 3]])
    order = heavy_first(counts, 1, 2, torch.device(DEVICE)).tolist()
    assert order == [2, 6, 0, 1, 3, 4, 5, 7]
    on_device = heavy_first_on_device(torch.tensor(np.tile(counts[0], 2), dtype=torch.int32, device=DEVICE))
    assert on_device.tolist() == order


def test_heads_may_have_budgets_of_their_own() -> None:
    counts = np.array([[1, 9], [20, 0]])
    order = heavy_first(counts, 2, 2, torch.device(DEVICE)).tolist()
    assert order == [2, 6, 1, 5, 0, 3, 4, 7]
    on_device = heavy_first_on_device(torch.tensor(np.tile(counts.ravel(), 2), dtype=torch.int32, device=DEVICE))
    assert on_device.tolist() == order


@pytest.mark.parametrize(("length", "steps"), [(300, 1), (128 * 130, 2)])
def test_bias_comes_in_whole_steps(length: int, steps: int) -> None:
    axis = BlockedAxis(length, 128, False, length)
    mask = torch.ones(1, 1, 2, axis.blocks, dtype=torch.bool, device=DEVICE)
    bias = list_blocks(mask, None, axis, Extras(bias=True)).bias
    assert bias is not None
    assert bias.shape == (2, 128 * steps)
