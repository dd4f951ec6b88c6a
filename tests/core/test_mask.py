"""BlockMask: its forms say the same, its parts keep their sizes, and nothing unsafe comes in through any of them."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rainfusion.core.errors import MaskError
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask import BlockMask, PackedMask


@st.composite
def masks(draw):
    """Masks of any shape, empty rows included, on NumPy or torch, and the layout of their tokens if there is one."""
    block = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
    layout = TokenLayout(grid, text=draw(st.integers(0, 5)), block=block)
    q_len, kv_len = draw(st.sampled_from([(layout.length, layout.length), (layout.length, 11), (13, layout.length)]))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), -(-q_len // block[0]), -(-kv_len // block[1]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = rng.random(shape) < rng.random()
    library = draw(st.sampled_from([np.asarray, torch.from_numpy]))
    return BlockMask.from_bool(library(blocks), q_len, kv_len, block), layout


def same(a: BlockMask, b: BlockMask) -> bool:
    sizes = ((m.q_len, m.kv_len, m.block) for m in (a, b))
    return next(sizes) == next(sizes) and np.array_equal(np.asarray(a.blocks), np.asarray(b.blocks))


@settings(max_examples=150)
@given(masks(), st.data())
def test_every_form_gives_the_mask_back(made, data):
    mask, layout = made
    sizes = (mask.q_len, mask.kv_len, mask.block)
    assert same(BlockMask.from_bool(mask.blocks, *sizes), mask)
    assert same(mask.packed().unpacked(), mask)
    assert same(BlockMask.from_bits(mask.to_bits(), *sizes), mask)
    columns, longest = mask.blocks.shape[-1], max(1, int(mask.counts.max()))
    for width in (None, columns, data.draw(st.integers(longest, columns))):
        counts, indices = mask.to_kv_indices(width)
        assert type(indices) is type(mask.blocks)
        assert indices.shape[-1] == (longest if width is None else width)
        assert same(BlockMask.from_kv_indices(counts, indices, *sizes), mask)
    for order in (None, layout):
        dense = mask.to_dense(order)
        assert tuple(dense.shape[2:]) == (mask.q_len, mask.kv_len)
        assert same(BlockMask.from_dense(dense, mask.block, order), mask)


@given(masks(), st.randoms())
def test_index_lists_are_ascending_padded_with_zeros_and_read_in_any_order(made, random):
    mask, _ = made
    counts, indices = (np.asarray(x) for x in mask.to_kv_indices(mask.blocks.shape[-1]))
    shuffled = indices.copy()
    for row in np.ndindex(*counts.shape):
        kept = indices[row][: counts[row]].tolist()
        assert kept == np.flatnonzero(np.asarray(mask.blocks)[row]).tolist()
        assert (indices[row][counts[row] :] == 0).all()
        random.shuffle(kept)
        shuffled[row][: counts[row]], shuffled[row][counts[row] :] = kept, 10**6  # slots beyond the count say nothing
    assert counts.dtype == indices.dtype == np.int32
    assert same(BlockMask.from_kv_indices(counts, shuffled, mask.q_len, mask.kv_len, mask.block), mask)


@given(masks())
def test_dense_form_stands_in_the_callers_token_order(made):
    mask, layout = made
    dense = np.asarray(mask.to_dense(layout))
    inverse = [layout.inverse if n == layout.length else np.arange(n) for n in (mask.q_len, mask.kv_len)]
    for i, j in [(0, 0), (mask.q_len - 1, mask.kv_len - 1), (mask.q_len // 2, mask.kv_len // 3)]:
        row, column = inverse[0][i] // mask.block[0], inverse[1][j] // mask.block[1]
        np.testing.assert_array_equal(dense[:, :, i, j], np.asarray(mask.blocks)[:, :, row, column])
    assert mask.density == np.asarray(mask.blocks).mean()
    assert mask.sparsity == 1 - mask.density
    assert f"density={mask.density:.4f}" in repr(mask)


@given(masks(), masks())
def test_like_moves_a_mask_to_the_other_library(one, two):
    mask, other = one[0], two[0]
    moved = mask.like(other.blocks)
    assert type(moved.blocks) is type(other.blocks)
    assert same(moved, mask)
    assert (moved is mask) == (type(mask.blocks) is type(other.blocks))


def test_like_copies_a_read_only_mask_so_that_no_library_can_write_to_it():
    blocks = np.ones((1, 1, 2, 2), dtype=bool)
    blocks.flags.writeable = False
    moved = BlockMask(blocks, 8, 8, (4, 4)).like(torch.zeros(1))
    moved.blocks[...] = False
    assert blocks.all()


LIBRARIES = pytest.mark.parametrize("library", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])


def example(library=np.asarray, *, layout=None, seed=0, shape=(2, 3, 4, 5)):
    """A mask of 14x19 tokens in blocks of 4 (by default), its last row and column ragged, one row empty."""
    blocks = np.random.default_rng(seed).random(shape) < 0.5
    blocks[0, 1, 2] = False
    return BlockMask(library(blocks), 4 * shape[2] - 2, 4 * shape[3] - 1, (4, 4), layout)


@LIBRARIES
def test_rows_that_keep_nothing_are_a_mask_in_every_form(library):
    mask = BlockMask(library(np.zeros((1, 2, 2, 3), dtype=bool)), 8, 12, (4, 4))
    sizes = (8, 12, (4, 4))
    counts, indices = mask.to_kv_indices()
    assert (tuple(indices.shape), int(counts.sum()), int(indices.sum())) == ((1, 2, 2, 1), 0, 0)
    for other in (
        BlockMask.from_bool(mask.blocks, *sizes),
        BlockMask.from_kv_indices(counts, indices, *sizes),
        BlockMask.from_kv_indices(counts, indices[..., :0], *sizes),
        BlockMask.from_bits(mask.to_bits(), *sizes),
        BlockMask.from_dense(mask.to_dense(), (4, 4)),
        mask.packed().unpacked(),
    ):
        assert same(other, mask)
    assert mask.density == 0


# -- parts ---------------------------------------------------------------------------------------------


@given(masks(), st.data())
def test_a_part_of_a_mask_is_the_mask_of_those_tokens(made, data):
    mask, _ = made
    ranges = []
    for size in mask.blocks.shape:
        start = data.draw(st.integers(0, size - 1))
        ranges.append(slice(start, data.draw(st.integers(start + 1, size))))
    part = mask[tuple(ranges)]
    b, h, rows, columns = ranges
    tokens = [
        slice(r.start * block, min(r.stop * block, length))
        for r, block, length in zip((rows, columns), mask.block, (mask.q_len, mask.kv_len), strict=True)
    ]
    np.testing.assert_array_equal(part.to_dense(), mask.to_dense()[b, h, tokens[0], tokens[1]])
    assert type(part.blocks) is type(mask.blocks)
    assert same(BlockMask(part.blocks, part.q_len, part.kv_len, part.block), part)  # passes the checks


@LIBRARIES
def test_whole_numbers_negative_and_left_out_indices(library):
    mask = example(library)
    blocks = np.asarray(mask.blocks)
    for part, expected in (
        (mask[1], blocks[1:]),
        (mask[-1, 0], blocks[1:, :1]),
        (mask[:, np.int64(2)], blocks[:, 2:3]),
        (mask[..., 4], blocks[..., 4:]),
        (mask[0, ..., -2:], blocks[:1, :, :, 3:]),
        (mask[...], blocks),
        (mask[:, :, 1:-1:1, :-3], blocks[:, :, 1:3, :2]),
    ):
        np.testing.assert_array_equal(part.blocks, expected)
    assert (mask[..., -2:].kv_len, mask[..., -2:].q_len) == (7, 14)
    assert (mask[..., :4].kv_len, mask[:, :, 1:].q_len, mask[:, :, 3].q_len) == (16, 10, 2)


def test_a_part_keeps_the_layout_only_if_its_tokens_are_the_layouts():
    layout = TokenLayout((2, 2, 4), text=3, block=4, sink=None)
    mask = example(layout=layout)
    assert mask[1].layout is mask[:, 1:].layout is mask[..., :4, :5].layout is layout
    assert mask[..., 1:].layout is mask[:, :, 0].layout is mask[..., :4].layout is None


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (2, r"index 2 of batch is empty or out of range; the mask has 2"),
        (-3, r"index -3 of batch is empty or out of range"),
        ((0, 3), r"index 3 of heads"),
        ((..., slice(0, 6)), r"slice\(0, 6, None\) of key blocks is empty or out of range; the mask has 5"),
        ((..., slice(5, None)), r"key blocks is empty"),
        ((..., slice(3, 2)), r"key blocks is empty"),
        ((..., slice(-6, 2)), r"key blocks is empty or out of range"),
        ((..., slice(2, 0)), r"key blocks is empty"),
        ((..., slice(0, 1), slice(0, 0)), r"key blocks is empty"),
        ((..., slice(0, 4, 2)), r"slice of step 1"),
        ((..., slice(None, None, -1)), r"slice of step 1"),
        ((..., slice(0.0, 1)), r"slice of step 1"),
        (True, r"index True of batch: give a whole number"),
        (None, r"index None of batch: give a whole number"),
        ("x", r"index 'x' of batch"),
        ([0, 1], r"index \[0, 1\] of batch"),
        ((0, 0, 0, 0, 0), r"a mask has four axes"),
        ((..., ...), r"a mask has four axes"),
    ],
)
def test_what_is_no_part_is_refused(index, said):
    with pytest.raises(MaskError, match=said):
        example()[index]


def test_a_mask_is_not_iterated_by_accident():
    with pytest.raises(TypeError, match="not iterable"):
        list(example())


# -- choosing by head ----------------------------------------------------------------------------------


@LIBRARIES
@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor], ids=["list", "numpy heads", "torch heads"])
@pytest.mark.parametrize("heads", [[True, False, True], [[True, False, True], [False, False, True]]])
def test_every_head_is_taken_from_one_of_two_masks(library, kind, heads):
    a, b = example(library), example(library, seed=1)
    mask = BlockMask.where(kind(heads), a, b)
    chosen = np.broadcast_to(heads, (2, 3))
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(mask.blocks[place], (a if chosen[place] else b).blocks[place])
    assert type(mask.blocks) is type(a.blocks)
    assert (mask.q_len, mask.kv_len, mask.block, mask.layout) == (a.q_len, a.kv_len, a.block, None)


def test_a_choice_by_head_keeps_the_layout_that_is_known():
    layout = TokenLayout((2, 2, 4), text=3, block=4, sink=None)
    heads, known, unknown = np.ones(3, bool), example(layout=layout), example()
    assert BlockMask.where(heads, known, unknown).layout is layout
    assert BlockMask.where(heads, unknown, known).layout is layout
    assert BlockMask.where(heads, known, example(layout=TokenLayout((2, 2, 4), text=3, block=4, sink=None))).layout


@pytest.mark.parametrize(
    ("heads", "other", "said"),
    [
        (np.ones(3, bool), example(shape=(2, 3, 4, 6)), "two masks of one problem"),
        (np.ones(3, bool), example(shape=(1, 3, 4, 5)), "two masks of one problem"),
        (np.ones(3, bool), BlockMask(example().blocks, 13, 19, (4, 4)), "two masks of one problem"),
        (np.ones(3, bool), example(layout=TokenLayout((2, 4, 2), block=4)), "two masks of one layout"),
        (np.ones(3, bool), example(torch.from_numpy), r"numpy on cpu and torch on cpu; move one"),
        (np.ones(3, np.uint8), example(), r"heads is uint8 \(3,\); give bool of shape \(3,\) or \(2, 3\)"),
        (np.ones(2, bool), example(), r"heads is bool \(2,\)"),
        (np.ones((2, 3, 1, 1), bool), example(), r"heads is bool \(2, 3, 1, 1\)"),
        ([[True], [True, False]], example(), r"heads is a list"),
        ("all", example(), r"heads is a str"),
        (None, example(), r"heads is a NoneType"),
    ],
)
def test_what_is_no_choice_of_heads_is_refused(heads, other, said):
    with pytest.raises(MaskError, match=said):
        BlockMask.where(heads, example(layout=TokenLayout((2, 2, 4), text=3, block=4, sink=None)), other)


# -- devices -------------------------------------------------------------------------------------------


def test_a_mask_moves_between_the_devices_of_its_library():
    layout = TokenLayout((2, 2, 4), text=3, block=4, sink=None)
    mask = example(torch.from_numpy, layout=layout)
    for device in ("meta", torch.device("meta")):
        away = mask.to(device)
        assert away.blocks.device.type == "meta"
        assert (away.q_len, away.kv_len, away.block, away.layout) == (14, 19, (4, 4), layout)
    assert mask.to("cpu") is mask
    assert example().to("cpu").blocks.shape == (2, 3, 4, 5)
    like = mask.like(torch.empty(0, device="meta"))
    assert (like.blocks.device.type, like.layout) == ("meta", layout)


@pytest.mark.parametrize(
    ("mask", "device"),
    [
        (example(), "cuda"),
        (example(torch.from_numpy), "nonsense"),
        (example(torch.from_numpy), 1.5),
        (example(torch.from_numpy), torch.float32),
    ],
)
def test_a_device_that_the_library_does_not_have_is_refused(mask, device):
    with pytest.raises(MaskError, match=r"a mask of (numpy|torch) cannot move to device .*use mask.like"):
        mask.to(device)


def test_like_takes_arrays_only():
    with pytest.raises(MaskError, match="not an array of a library"):
        example().like("cpu")


class CountingTensor(torch.Tensor):
    """A tensor that counts what would make the host wait for a device."""

    waits = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("item", "cpu", "numpy", "tolist", "__bool__", "__int__", "__array__", "__index__"):
            CountingTensor.waits += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_parts_choices_and_packing_do_not_wait_for_the_device():
    a, b = (
        BlockMask(example(torch.from_numpy, seed=i).blocks.as_subclass(CountingTensor), 14, 19, (4, 4)) for i in (0, 1)
    )
    heads = torch.tensor([True, False, True]).as_subclass(CountingTensor)
    CountingTensor.waits = 0
    mask = BlockMask.where(heads, a[:1], b[:1])[:, 1:, :, 2:].packed().unpacked()
    mask.to_kv_indices(mask.blocks.shape[-1])
    assert CountingTensor.waits == 0
    int(mask.blocks.sum())
    assert CountingTensor.waits == 1  # it does count
    away = example(torch.from_numpy).to("meta")  # has no values to wait for: any look at them fails
    away = BlockMask.where(torch.ones(3, dtype=torch.bool, device="meta"), away, away)[..., 1:].packed().unpacked()
    assert away.blocks.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parts_choices_packing_and_printing_do_not_wait_for_cuda():
    a, b = (example(torch.from_numpy, seed=i).to("cuda") for i in (0, 1))
    heads = torch.tensor([True, False, True], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask = BlockMask.where(heads, a, b)[:, 1:, :, 2:].packed().unpacked()
        mask.to_kv_indices(mask.blocks.shape[-1])
        assert "density" not in repr(mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    heads, (a, b) = heads.cpu(), (m.to("cpu") for m in (a, b))
    assert same(mask.to("cpu"), BlockMask.where(heads, a, b)[:, 1:, :, 2:])


def test_printing_a_mask_does_not_wait_for_its_device():
    for library in (np.asarray, torch.from_numpy):
        assert "density=" in repr(example(library))
    away = example(torch.from_numpy).to("meta")
    assert repr(away) == "BlockMask(batch=2, heads=3, blocks=4x5 of 4x4, tokens=14x19)"
    assert repr(away.packed()) == "PackedMask(batch=2, heads=3, tokens=14x19 in blocks of (4, 4))"


# -- packed form ---------------------------------------------------------------------------------------


@given(masks())
def test_packed_bits_are_those_of_the_host_form(made):
    mask, layout = made
    mask = BlockMask(mask.blocks, mask.q_len, mask.kv_len, mask.block, layout)
    packed = mask.packed()
    assert type(packed.bits) is type(mask.blocks)
    assert (packed.q_len, packed.kv_len, packed.block, packed.layout) == (
        mask.q_len,
        mask.kv_len,
        mask.block,
        mask.layout,
    )
    np.testing.assert_array_equal(packed.bits, mask.to_bits())
    assert np.asarray(packed.bits).dtype == np.uint8
    back = PackedMask(packed.bits, mask.q_len, mask.kv_len, mask.block, layout).unpacked()
    assert same(back, mask)
    assert back.layout is layout


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PackedMask(np.zeros((1, 1, 2, 2), np.uint8), 8, 12, (4, 4)), r"need \(batch, heads, 2, 1\)"),
        (lambda: PackedMask(np.zeros((1, 1, 2, 1), bool), 8, 12, (4, 4)), r"bits has dtype bool; give uint8"),
        (lambda: PackedMask(None, 8, 12, (4, 4)), r"not an array of a library"),
        (lambda: PackedMask(np.zeros((1, 1, 2, 1), np.uint8), 8, 12, (4, 4), "x"), r"layout='x' is not a layout"),
    ],
)
def test_what_is_no_packed_mask_is_refused(make, said):
    with pytest.raises(MaskError, match=said):
        make()


@LIBRARIES
def test_masks_pickle(library):
    layout = TokenLayout((2, 2, 4), text=3, block=4, sink=None)
    mask = example(library, layout=layout)
    for back in (pickle.loads(pickle.dumps(mask)), pickle.loads(pickle.dumps(mask.packed())).unpacked()):
        assert same(back, mask)
        assert back.layout == layout


# -- index lists ---------------------------------------------------------------------------------------


@LIBRARIES
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_integers_of_every_width_are_read(library, dtype):
    mask = example()
    counts, indices = (library(x.astype(dtype)) for x in mask.to_kv_indices())
    assert same(BlockMask.from_kv_indices(counts, indices, 14, 19, (4, 4)), mask)


@LIBRARIES
def test_many_rows_are_read_in_pieces(library, monkeypatch):
    monkeypatch.setattr("rainfusion.core.mask_forms._ENTRIES_AT_ONCE", 30)
    mask = example(library)
    assert same(BlockMask.from_kv_indices(*mask.to_kv_indices(), 14, 19, (4, 4)), mask)


def test_a_huge_grid_is_refused_before_memory_is_taken():
    counts, indices = np.zeros((1, 8, 2), np.int32), np.zeros((1, 8, 2, 1), np.int32)
    kv_len = 2**31 - 1
    tracemalloc.start()
    with pytest.raises(
        MaskError, match=rf"a grid of 1x8x2x{kv_len} entries takes {16 * kv_len} bytes; at most {2**33}"
    ):
        BlockMask.from_kv_indices(counts, indices, 8, kv_len, (4, 1))
    with pytest.raises(MaskError, match=f"takes {2**36} bytes"):
        BlockMask(np.ones((1, 1, 1, 1), bool), 2**18, 2**18, (2**18, 2**18)).to_dense()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# -- what a traced graph needs -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_mask_from_trusted_parts_works_inside_a_compiled_graph():
    def kept(blocks, heads):
        a = BlockMask._trusted(blocks, 14, 19, (4, 4), None)
        b = BlockMask._trusted(~blocks, 14, 19, (4, 4), None)
        return BlockMask.where(heads, a, b).packed().unpacked()[..., 1:].counts

    blocks, heads = example(torch.from_numpy).blocks, torch.tensor([True, False, True])
    compiled = torch.compile(kept, backend="eager", fullgraph=True)
    assert torch.equal(compiled(blocks, heads), kept(blocks, heads))


def test_a_mask_that_a_tracer_holds_can_be_printed():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert "tokens=8x12)" in repr(BlockMask(torch.ones(1, 1, 2, 3, dtype=torch.bool), 8, 12, (4, 4)))


# -- refusals ------------------------------------------------------------------------------------------


ROW = np.ones((1, 1, 2, 3), dtype=bool)
INDICES = np.array([[[[0, 1], [2, 0]]]])


def of_indices(counts, indices, kv_len=12, block=(4, 4)):
    return BlockMask.from_kv_indices(np.asarray(counts), np.asarray(indices), 8, kv_len, block)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BlockMask(ROW, 8, 13, (4, 4)), r"shape \(1, 1, 2, 3\); 8x13 tokens .*need \(batch, heads, 2, 4\)"),
        (lambda: BlockMask(ROW[0], 8, 12, (4, 4)), r"shape \(1, 2, 3\)"),
        (lambda: BlockMask(ROW[:0], 8, 12, (4, 4)), r"shape \(0, 1, 2, 3\)"),
        (lambda: BlockMask(ROW.astype(np.uint8), 8, 12, (4, 4)), r"dtype uint8; give bool"),
        (lambda: BlockMask(ROW.tolist(), 8, 12, (4, 4)), r"not an array of a library"),
        (lambda: BlockMask(ROW, 8, 12, 4), r"block=4 is not a pair"),
        (lambda: BlockMask(ROW, 8, 12, (4, 4, 4)), r"block=\(4, 4, 4\) is not a pair"),
        (lambda: BlockMask(ROW, 8, 12, (4, 0)), r"block=0 is not allowed"),
        (lambda: BlockMask(ROW, -8, 12, (4, 4)), r"q_len=-8 is not allowed"),
        (lambda: BlockMask(ROW, 8.0, 12, (4, 4)), r"q_len=8.0 is not an integer"),
        (lambda: BlockMask(ROW, 8, 12, (4, 4), "x"), r"layout='x' is not a layout"),
        (lambda: BlockMask(ROW, 8, 12, (4, 4), TokenLayout(block=8)), r"layout has blocks of \(8, 8\) and the mask of"),
        (lambda: BlockMask(ROW, 8, 12, (4, 4)).to_dense("x"), r"layout='x' is not a layout"),
        (lambda: BlockMask.from_dense(np.ones((1, 1, 8, 8), bool), (4, 4), "x"), r"layout='x' is not a layout"),
        (lambda: BlockMask(ROW, 8, 12, (4, 4)).to_kv_indices(0), r"width=0 is not allowed"),
        (lambda: BlockMask(ROW, 8, 12, (4, 4)).to_kv_indices(2), r"width=2 .* at least 3.* at most 3"),
        (lambda: BlockMask(ROW, 8, 12, (4, 4)).to_kv_indices(4), r"width=4 .* at most 3"),
        (lambda: BlockMask(ROW, 8, 12, (4, 4)).to_kv_indices(True), r"width=True is not allowed"),
        (lambda: of_indices([[[2, 1]]], [[[[0, 3], [2, 0]]]]), r"index lies outside \[0, 3\)"),
        (lambda: of_indices([[[2, 1]]], [[[[0, -1], [2, 0]]]]), r"index lies outside \[0, 3\)"),
        (lambda: of_indices([[[2, 1]]], [[[[0, 2**40], [2, 0]]]]), r"index lies outside \[0, 3\)"),
        (lambda: of_indices([[[2, 1]]], [[[[1, 1], [2, 0]]]]), r"names a key block twice"),
        (lambda: of_indices([[[1, 0]]], INDICES[..., :0]), r"count lies outside \[0, 0\]"),
        (lambda: of_indices(np.uint64([[[2**63 + 1, 1]]]), INDICES), r"count lies outside \[0, 2\]"),
        (lambda: of_indices([[[2, 1]]], np.uint64(INDICES) - np.uint64(1)), r"index lies outside \[0, 3\)"),
        (lambda: of_indices([[[True, True]]], INDICES), r"counts is bool and indices int64; give integers"),
        (lambda: of_indices([[[3, 1]]], INDICES), r"count lies outside \[0, 2\]"),
        (lambda: of_indices([[[-1, 1]]], INDICES), r"count lies outside \[0, 2\]"),
        (lambda: of_indices([[[2.0, 1.0]]], INDICES), r"counts is float64 and indices int64; give integers"),
        (lambda: of_indices([[[2, 1]]], INDICES + 0.5), r"indices float64; give integers"),
        (lambda: of_indices([[2, 1]], INDICES), r"shape \(1, 2\) and indices \(1, 1, 2, 2\)"),
        (lambda: of_indices(np.ones((0, 1, 2), int), INDICES[:0]), r"shape \(0, 1, 2\)"),
        (
            lambda: of_indices([[[2, 1, 1]]], [[[[0, 1], [2, 0], [1, 0]]]]),
            r"shape \(1, 1, 3\) .*need \(batch, heads, 2\)",
        ),
        (lambda: of_indices([[[2, 1]]], INDICES, block=(4, 0)), r"block=0 is not allowed"),
        (lambda: BlockMask.from_kv_indices(np.ones(1), torch.ones(1), 8, 8, (4, 4)), r"not an array of a library"),
        (lambda: BlockMask.from_bits(np.full((1, 1, 2, 1), 15, np.uint8), 8, 12, (4, 4)), r"bits beyond key block 2"),
        (
            lambda: BlockMask.from_bits(np.full((1, 1, 2, 2), 7, np.uint8), 8, 12, (4, 4)),
            r"need \(batch, heads, 2, 1\)",
        ),
        (lambda: BlockMask.from_bits(np.full((1, 1, 2, 1), 7), 8, 12, (4, 4)), r"bits has dtype int64"),
        (lambda: BlockMask.from_bits(b"\x07\x07", 8, 12, (4, 4)), r"bits is a bytes"),
        (
            lambda: BlockMask.from_dense(np.eye(8, dtype=bool)[None, None], (4, 4)),
            r"attends blocks of \(4, 4\) in part",
        ),
        (lambda: BlockMask.from_dense(np.ones((8, 8), bool), (4, 4)), r"shape \(8, 8\); give \[batch"),
        (lambda: BlockMask.from_dense(np.ones((1, 1, 8, 0), bool), (4, 4)), r"kv_len=0 is not allowed"),
    ],
)
def test_what_is_no_mask_is_refused(make, said):
    with pytest.raises(MaskError, match=said):
        make()


def test_sizes_become_plain_numbers():
    mask = BlockMask(ROW, np.int64(8), np.int32(12), [4, np.int8(4)])
    assert (mask.q_len, mask.kv_len, mask.block) == (8, 12, (4, 4))
    assert {type(n) for n in (mask.q_len, mask.kv_len, *mask.block)} == {int}
