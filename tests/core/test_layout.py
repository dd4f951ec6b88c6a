"""TokenLayout: whole windows fill whole blocks, in one bijective order with the protected tokens at its end."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from itertools import product
from math import lcm, prod

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rainfusion import TokenLayout
from rainfusion.core.checks import LARGEST
from rainfusion.core.errors import LayoutError
from rainfusion.core.layout import SINKS, BlockedAxis, Grid, Text, Tokens, compact_window

small = st.integers(1, 7)
blocks = st.sampled_from([1, 2, 8, 12, 16, (8, 16), (16, 4), (6, 4)])
sinks = st.sampled_from(
    [*SINKS, ("first_frame", "last_frame"), ("first_frame", "last_frame_keys"), ("last_frame_keys", "first_frame_keys")]
)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from(SINKS)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["parts", "block", "grid", "window", "sink", "text", "tokens", "x"]), inner),
    ),
    max_leaves=12,
)

# What models pack into one sequence.
EDIT = TokenLayout(parts=(Text(37), Grid(1, 13, 15), Grid(1, 9, 11), Grid(1, 8, 8)), block=16)
CLIPS = TokenLayout(
    parts=(Text(11), Grid(5, 6, 8), Tokens(20), Grid(4, 7, 9, sink="first_frame_keys"), Tokens(13), Text(3)),
    block=(16, 8),
)
FIRST_AND_LAST = TokenLayout((6, 9, 10), text=12, block=16, sink=("first_frame", "last_frame"))
BOTH_OF_TWO = TokenLayout((2, 5, 6), block=8, sink=("last_frame_keys", "first_frame"))


@st.composite
def layouts(draw):
    """Short forms of up to a thousand tokens, the window often larger than the grid."""
    block = draw(blocks)
    return TokenLayout(
        grid=draw(st.tuples(small, st.integers(1, 11), st.integers(1, 13))),
        text=draw(st.sampled_from([0, 0, 1, 5, 16, 37])),
        text_position=draw(st.sampled_from(["start", "end"])),
        window=draw(st.one_of(st.none(), windows(block))),
        block=block,
        sink=draw(st.sampled_from(["first_frame", None])),
    )


@st.composite
def windows(draw, block):
    sides = block if isinstance(block, tuple) else (block, block)
    volume = lcm(*sides) * draw(st.sampled_from([1, 1, 2, 3]))
    t = draw(st.sampled_from([n for n in range(1, volume + 1) if volume % n == 0]))
    h = draw(st.sampled_from([n for n in range(1, volume // t + 1) if volume // t % n == 0]))
    return (t, h, volume // t // h)


@st.composite
def part_layouts(draw):
    """Layouts of up to six parts of every kind."""
    block = draw(blocks)
    grid = st.builds(Grid, small, small, st.integers(1, 9), st.one_of(st.none(), windows(block)), sinks)
    counts = st.sampled_from([0, 1, 5, 16, 37])
    part = st.one_of(grid, grid, st.builds(Text, counts), st.builds(Tokens, counts))
    return TokenLayout(parts=draw(st.lists(part, max_size=6)), block=block)


def places(layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
    """Of every position of the block order: the index of its part, and its token counted from the part's first."""
    starts = np.array(layout.starts)
    part = np.searchsorted(starts, layout.order, side="right") - 1
    return part, layout.order - starts[part]


def sink_of_frame(grid: Grid, frame: np.ndarray) -> np.ndarray:
    """0 for a frame that is no sink, 1 for one protected as keys only, 2 for another sink. Written from the rules."""
    names = (grid.sink,) if isinstance(grid.sink, str) else grid.sink or ()
    kind = np.zeros_like(frame)
    for name in names if grid.frames > 1 else ():
        kind[frame == (0 if "first" in name else grid.frames - 1)] = 1 if "keys" in name else 2
    return kind


def rank_of(layout: TokenLayout) -> np.ndarray:
    """The place of every position among the groups of the block order, from coordinates alone."""
    index, token = places(layout)
    rank = np.empty_like(token)
    for i, part in enumerate(layout.parts):
        here = index == i
        if isinstance(part, Grid):
            where = np.stack(np.unravel_index(token[here], part.sizes), axis=-1)
            first = int(sink_of_frame(part, np.zeros(1, dtype=int))[0] > 0)
            free = (sink_of_frame(part, np.arange(part.frames)) == 0).sum()
            whole = np.array((free, part.height, part.width)) // part.window * part.window
            ragged = ((where - (first, 0, 0)) >= whole).any(axis=1)
            kind = sink_of_frame(part, where[:, 0])
            rank[here] = np.where(kind > 0, 2 + kind, ragged)
        else:
            rank[here] = 5 if isinstance(part, Text) else 2
    return rank


def coordinates(layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
    """Short form: (t, h, w) of every video token in block order, and whether each position holds a video token."""
    token = layout.order - (layout.text if isinstance(layout.parts[0], Text) else 0)
    is_video = (token >= 0) & (token < prod(layout.grid))
    return np.stack(np.unravel_index(token[is_video], layout.grid), axis=-1), is_video


def sink_frames(layout: TokenLayout) -> int:
    return int(layout.grids[0].sink == "first_frame")


@given(layouts())
@example(TokenLayout((1, 1, 1)))
@example(TokenLayout((1, 1, 1), text=3, text_position="start"))
@example(TokenLayout((2, 7, 11), block=64))
@example(TokenLayout((7, 13, 17), text=77, block=(128, 64)))
@example(TokenLayout((3, 5, 200), block=32))
def test_order_is_a_bijection_that_its_inverse_restores(layout):
    everyone = np.arange(layout.length)
    assert layout.length == prod(layout.grid) + layout.text
    np.testing.assert_array_equal(np.sort(layout.order), everyone)
    np.testing.assert_array_equal(layout.order[layout.inverse], everyone)
    np.testing.assert_array_equal(layout.inverse[layout.order], everyone)
    assert layout.order.dtype == layout.inverse.dtype == np.int64
    assert not layout.order.flags.writeable


@given(layouts())
@example(TokenLayout((5, 16, 24), block=32))
@example(TokenLayout((3, 16, 16), block=64))
@example(TokenLayout((5, 9, 17), block=128))
@example(TokenLayout((5, 16, 16), block=(128, 64)))
@example(TokenLayout((4, 17, 19), block=(32, 64), window=(2, 8, 8)))
def test_whole_windows_fill_whole_blocks(layout):
    """Every whole window is one run of the order that starts on a block of either side and fills blocks."""
    where, _ = coordinates(layout)
    window, first = np.array(layout.window), sink_frames(layout)
    size = np.array(layout.grid) - (first, 0, 0)
    volume, whole = window.prod(), (size // window).prod()
    assert all(volume % b == 0 for b in layout.block)
    runs = where[: whole * volume].reshape(whole, volume, 3)
    corners = runs.min(axis=1)
    np.testing.assert_array_equal(runs.max(axis=1) - corners + 1, np.broadcast_to(window, (whole, 3)))
    np.testing.assert_array_equal((corners - (first, 0, 0)) % window, 0)
    assert len(np.unique(corners, axis=0)) == whole


@given(layouts())
def test_remainders_are_pooled_behind_the_windows_and_protected_tokens_come_last(layout):
    """Along the order: whole windows, then the H, W, HW remainders, those of T, the first frame, text."""
    where, is_video = coordinates(layout)
    window, first = np.array(layout.window), sink_frames(layout)
    size = np.array(layout.grid) - (first, 0, 0)
    t, h, w = ((where - (first, 0, 0)) >= size // window * window).T
    in_sink = where[:, 0] < first
    rank = np.where(in_sink, 8, 4 * t + 2 * w + h)
    assert (np.diff(rank) >= 0).all()
    assert is_video[: prod(layout.grid)].all()
    np.testing.assert_array_equal(np.diff(layout.order[prod(layout.grid) :]), 1)
    ranges = {r.name: (r.start, r.stop) for r in layout.protected}
    frame = prod(layout.grid[1:])
    video = prod(layout.grid)
    assert ranges.get("first_frame") == ((video - frame, video) if first else None)
    assert ranges.get("text") == ((video, video + layout.text) if layout.text else None)
    np.testing.assert_array_equal(np.flatnonzero(in_sink), np.arange(video - frame * first, video))


@given(layouts())
def test_remainder_tiles_are_as_wide_as_their_rest_allows(layout):
    """Within a remainder, tokens of one tile stay together: each tile is a box as in the windows proper."""
    where, _ = coordinates(layout)
    window, first = np.array(layout.window), sink_frames(layout)
    size = np.array(layout.grid) - (first, 0, 0)
    where = where[~(where[:, 0] < first)] - (first, 0, 0)
    whole = size // window * window
    # A tile is named by its box and, inside the box, by its place along the axes that are not ragged.
    tile = np.where(where >= whole, -1, where // window)
    changes = (np.diff(tile, axis=0) != 0).any(axis=1).sum()
    assert changes + 1 == len(np.unique(tile, axis=0))


def test_wan_720p_aligns_500_blocks():
    layout = TokenLayout((21, 45, 80))
    assert layout.window == (2, 8, 8)
    where, _ = coordinates(layout)
    blocks = where[: 590 * 128].reshape(590, 128, 3)
    extents = blocks.max(axis=1) - blocks.min(axis=1) + 1
    assert (extents == (2, 8, 8)).all(axis=1).sum() == 500
    assert (extents[:500] == (2, 8, 8)).all()


@pytest.mark.parametrize("position", ["start", "end"])
def test_text_stands_at_the_end_of_the_order_wherever_the_caller_keeps_it(position):
    layout = TokenLayout((2, 2, 2), text=3, text_position=position, block=4)
    text = [0, 1, 2] if position == "start" else [8, 9, 10]
    first = 3 if position == "start" else 0
    assert layout.order[-3:].tolist() == text
    assert layout.order[-7:-3].tolist() == [first, first + 1, first + 2, first + 3]


def test_an_image_has_no_sink_and_two_frames_have_one():
    assert TokenLayout((1, 16, 16)).protected == ()
    assert TokenLayout((2, 16, 16)).protected == (("first_frame", 256, 512, True),)
    assert TokenLayout((2, 16, 16), sink=None).protected == ()


def test_only_a_side_of_the_layouts_length_is_ordered_and_protected():
    layout = TokenLayout((3, 4, 4), text=2, block=8)
    own, other = layout.axis(50, 0), layout.axis(51, 1)
    assert (own.ordered, own.blocks, own.free_blocks, own.protected_from) == (True, 7, 4, 32)
    assert (other.ordered, other.blocks, other.free_blocks) == (False, 7, 7)
    assert own.counts.tolist() == [8] * 6 + [2]
    assert other.counts.tolist() == [8] * 6 + [3]


@given(st.integers(1, 160), st.tuples(small, st.integers(1, 40), st.integers(1, 40)))
def test_compact_window_is_the_most_compact_that_fits(volume, grid):
    sizes = [n for n in range(1, volume + 1) if volume % n == 0]
    every = [w for w in product(sizes, repeat=3) if prod(w) == volume]
    fitting = [w for w in every if all(a <= b for a, b in zip(w, grid, strict=True))]
    chosen = compact_window(volume, grid)
    costs = {w: 8 * w[0] ** 2 + w[1] ** 2 + w[2] ** 2 for w in fitting or every}
    assert costs[chosen] == min(costs.values())
    assert chosen[1] <= chosen[2] or (chosen[0], chosen[2], chosen[1]) not in costs


@pytest.mark.parametrize(
    ("block", "grid", "window"),
    [
        (128, (20, 45, 80), (2, 8, 8)),
        (64, (20, 45, 80), (2, 4, 8)),
        (32, (20, 45, 80), (2, 4, 4)),
        (128, (1, 64, 64), (1, 8, 16)),
        (128, (20, 45, 4), (4, 8, 4)),
        (128, (1, 2, 2), (2, 8, 8)),  # nothing fits
    ],
)
def test_compact_windows_in_use(block, grid, window):
    assert compact_window(block, grid) == window


# -- layouts of parts ----------------------------------------------------------------------------


@given(part_layouts())
@example(EDIT)
@example(CLIPS)
@example(FIRST_AND_LAST)
@example(BOTH_OF_TWO)
@example(TokenLayout(parts=[Text(4), Tokens(9)], block=4))
def test_the_order_of_parts_is_a_bijection_by_groups(layout):
    """Whole windows of every grid, remainders, other tokens, keys-only sinks, sinks, text; parts as they stand."""
    if not layout.parts:
        assert (layout.length, layout.order, layout.inverse, layout.protected) == (None, None, None, ())
        return
    tokens = np.arange(sum(part.count for part in layout.parts))
    np.testing.assert_array_equal(np.sort(layout.order), tokens)
    np.testing.assert_array_equal(layout.order[layout.inverse], tokens)
    assert layout.length == tokens.size
    assert not layout.order.flags.writeable
    assert not layout.inverse.flags.writeable
    rank, index = rank_of(layout), places(layout)[0]
    assert (np.diff(rank) >= 0).all()
    for group in range(6):
        here = rank == group
        assert (np.diff(index[here]) >= 0).all()
        if group >= 2:  # not folded
            assert (np.diff(layout.order[here]) > 0).all()
    if not layout.is_ordered:
        np.testing.assert_array_equal(layout.order, tokens)
    assert layout.order is TokenLayout(parts=layout.parts, block=layout.block).order


@given(part_layouts())
@example(EDIT)
@example(CLIPS)
def test_whole_windows_of_every_grid_fill_whole_blocks(layout):
    if not layout.grids:
        return
    index, token = places(layout)
    position = 0
    for i, part in enumerate(layout.parts):
        if isinstance(part, Grid):
            window, volume = np.array(part.window), prod(part.window)
            start, stop = part.free_frames
            whole = int(((stop - start, part.height, part.width) // window).prod())
            assert all(position % b == volume % b == 0 for b in layout.block)
            run = slice(position, position + whole * volume)
            assert (index[run] == i).all()
            where = np.stack(np.unravel_index(token[run], part.sizes), axis=-1).reshape(whole, volume, 3)
            corners = where.min(axis=1)
            np.testing.assert_array_equal(where.max(axis=1) - corners + 1, np.broadcast_to(window, (whole, 3)))
            np.testing.assert_array_equal((corners - (start, 0, 0)) % window, 0)
            assert len(np.unique(corners, axis=0)) == whole
            position += whole * volume
    assert (rank_of(layout)[position:] > 0).all()


@given(part_layouts())
def test_every_grid_is_folded_as_it_would_be_alone(layout):
    index, token = places(layout) if layout.parts else (np.empty(0), np.empty(0))
    for i, part in enumerate(layout.parts):
        if isinstance(part, Grid):
            alone = TokenLayout(part.sizes, window=part.window, block=layout.block, sink=part.sink)
            np.testing.assert_array_equal(token[index == i], alone.order)


@given(part_layouts())
@example(EDIT)
@example(CLIPS)
@example(BOTH_OF_TWO)
def test_protected_ranges_are_the_end_of_the_order(layout):
    if not layout.parts:
        return
    rank, end = rank_of(layout), layout.length
    for found in reversed(layout.protected):
        assert found.stop == end
        assert found.start < found.stop
        expected = {5: "text", 4: "frame", 3: "frame"}
        for value in rank[found.start : found.stop]:
            assert expected[value] in found.name
            assert found.rows == (value > 3)
        assert (np.diff(layout.order[found.start : found.stop]) == 1).all()
        end = found.start
    assert (rank[:end] < 3).all()
    assert len({r.name for r in layout.protected}) == len(layout.protected)


@given(part_layouts())
@example(CLIPS)
@example(BOTH_OF_TWO)
def test_an_axis_knows_what_is_protected_on_its_side(layout):
    if not layout.parts:
        assert layout.axis(7, 0) == BlockedAxis(7, layout.block[0], False, 7)
        return
    rank = rank_of(layout)
    for side, protected in enumerate((rank > 3, rank > 2)):
        axis = layout.axis(layout.length, side)
        assert (axis.length, axis.block, axis.ordered) == (layout.length, layout.block[side], layout.is_ordered)
        assert axis.protected_from == layout.length - protected.sum()
        per_block = [protected[i : i + axis.block] for i in range(0, layout.length, axis.block)]
        assert axis.blocks == len(per_block)
        assert axis.free_blocks == sum(not block.any() for block in per_block)
        assert axis.counts.tolist() == [len(block) for block in per_block]
        assert axis.log_counts.dtype == np.float64
        np.testing.assert_array_equal(axis.log_counts, np.log(axis.counts))
        assert layout.axis(layout.length + 1, side) == BlockedAxis(
            layout.length + 1, axis.block, False, layout.length + 1
        )


@given(part_layouts(), st.integers(-3, 2))
@example(EDIT, 0)
@example(CLIPS, -1)
@example(TokenLayout(), 1)
def test_to_blocks_and_from_blocks_undo_each_other_on_numpy_and_torch(layout, axis):
    shape = [2, 3, 4]
    shape[axis] = layout.length or 5
    x = np.arange(prod(shape), dtype=np.float32).reshape(shape)
    there = layout.to_blocks(x, axis)
    assert type(there) is np.ndarray
    np.testing.assert_array_equal(there, x if layout.order is None else np.take(x, layout.order, axis=axis))
    np.testing.assert_array_equal(layout.from_blocks(there, axis=axis), x)
    tensor = torch.tensor(x, dtype=torch.bfloat16)
    moved = layout.to_blocks(tensor, axis)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, torch.tensor(there, dtype=torch.bfloat16))
    assert torch.equal(layout.from_blocks(moved, axis), tensor)


def test_to_blocks_takes_integers_and_lets_gradients_through():
    np.testing.assert_array_equal(EDIT.to_blocks(np.arange(EDIT.length), 0), EDIT.order)
    np.testing.assert_array_equal(EDIT.from_blocks(np.arange(EDIT.length), axis=0), EDIT.inverse)
    x = torch.ones(1, 2, EDIT.length, 3, requires_grad=True)
    EDIT.to_blocks(x).square().sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize(
    ("x", "axis", "said"),
    [
        ([1, 2], 0, r"x=\[1, 2\] is not an array"),
        (np.zeros((2, 3)), 2, r"axis=2 is not an axis of an array of shape \(2, 3\)"),
        (np.zeros((2, 3)), "1", r"axis='1' is not an axis"),
        (np.zeros((2, 3)), 1, r"axis 1 of .* has 3 tokens; the layout \(text 37 .*\) has 395"),
    ],
)
def test_to_blocks_refuses_what_does_not_hold_the_layouts_tokens(x, axis, said):
    for method in (EDIT.to_blocks, EDIT.from_blocks):
        with pytest.raises(LayoutError, match=said):
            method(x, axis)


@given(st.one_of(part_layouts(), layouts()))
@example(TokenLayout())
@example(CLIPS)
def test_a_layout_comes_back_from_json_pickle_and_copy(layout):
    again = TokenLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    for other in (again, pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), replace(layout)):
        assert other == layout
        assert hash(other) == hash(layout)
        assert repr(other) == repr(layout)
        assert (other.order is None) == (not layout.parts)


@given(junk)
@example({"parts": [{"grid": [2**31 - 1, 2**31 - 1, 2**31 - 1]}], "block": 1})
@example({"parts": [{"text": LARGEST}, {"text": LARGEST}], "block": 1})
@example({"parts": [{"grid": [1, 2, 3], "text": 1}], "block": [8, 8]})
@example({"parts": [{"text": 1, 0: 1}], "block": [8, 8]})
@example({"parts": [{"text": 1}] * 1025, "block": [8, 8]})
@example({"parts": {"grid": 1}, "block": [8, 8]})
@example({"parts": [], "block": [8, 8], "version": 1})
@example({"parts": [{"grid": [4, 4, 4], "window": [2, 2, 2]}], "block": [16, 16]})
@example({"parts": [{"grid": [4, 4, 4]}], "block": [1009, 1013 * 1019]})
@example({"parts": [{"grid": [4, 4, 4], "sink": {"first_frame": 1}}], "block": [16, 16]})
def test_junk_from_json_is_a_layout_error(record):
    for given_record in (record, {"parts": record, "block": 8}, {"parts": [record], "block": 8}):
        layout, message = read(given_record)
        assert len(message) < 400
        assert layout is None or TokenLayout.from_dict(layout.to_dict()) == layout


def read(record: object) -> tuple[TokenLayout | None, str]:
    """The layout, or what the LayoutError says."""
    try:
        return TokenLayout.from_dict(record), ""
    except LayoutError as error:
        return None, str(error)


def test_a_layout_of_the_most_tokens_costs_nothing_until_its_order_is_asked_for():
    layout = TokenLayout.from_dict({"parts": [{"grid": [2**15 - 1, 2**8, 2**8]}, {"text": 2**16 - 1}], "block": 128})
    assert layout.length == LARGEST
    assert layout.axis(LARGEST, 1).blocks == 2**24
    assert [r.name for r in layout.protected] == ["first_frame", "text"]


def test_the_short_form_is_the_parts_it_stands_for():
    short = TokenLayout((21, 45, 80), text=226, text_position="start")
    parts = TokenLayout(parts=[Text(226), Grid(21, 45, 80, window=(2, 8, 8))], block=(128, 128))
    assert short == parts == TokenLayout(parts=(Text(0), Text(226), Grid(21, 45, 80)), window=(2, 8, 8))
    assert hash(short) == hash(parts)
    assert short.parts == (Text(226), Grid(21, 45, 80, (2, 8, 8), "first_frame"))
    assert short != TokenLayout((21, 45, 80), text=226)
    assert short != replace(short, block=64)
    assert (short.grid, short.window, short.text, short.starts) == ((21, 45, 80), (2, 8, 8), 226, (0, 226))
    assert (EDIT.grid, EDIT.window, EDIT.text, len(EDIT.grids)) == (None, None, 37, 3)
    assert TokenLayout((1, 4, 4)) == TokenLayout((1, 4, 4), sink=None), "one frame has no sink"
    assert TokenLayout((3, 4, 4), sink=("first_frame",)) == TokenLayout((3, 4, 4))
    assert Grid(3, 4, 4, sink=["last_frame", "first_frame_keys"]).sink == ("first_frame_keys", "last_frame")
    assert TokenLayout() == TokenLayout(parts=()) == TokenLayout(parts=[Text(0), Tokens(0)])


def test_a_window_for_all_is_that_of_every_grid_without_its_own():
    layout = TokenLayout(parts=(Grid(4, 8, 8), Grid(4, 8, 8, window=(1, 4, 4))), window=(4, 2, 2), block=16)
    assert [grid.window for grid in layout.grids] == [(4, 2, 2), (1, 4, 4)]


def test_windows_fit_into_the_frames_that_are_no_sink():
    assert TokenLayout((2, 16, 16), sink=None).window == (2, 8, 8)
    assert TokenLayout((2, 16, 16)).window == (1, 8, 16)
    assert TokenLayout((3, 16, 16), sink=("first_frame", "last_frame_keys")).window == (1, 8, 16)
    assert TokenLayout((2, 16, 16), sink=("first_frame", "last_frame")).window == (2, 8, 8), "nothing is folded"


def test_qwen_image_edit_is_one_layout():
    assert [r[:3] for r in EDIT.protected] == [("text", 358, 395)]
    assert EDIT.order[-37:].tolist() == list(range(37))
    assert [grid.window for grid in EDIT.grids] == [(1, 4, 4)] * 3
    whole = (3 * 3 + 2 * 2 + 2 * 2) * 16
    assert (rank_of(EDIT) == 0).sum() == whole
    assert EDIT.axis(395, 0).free_blocks == 358 // 16


def test_two_clips_with_audio_protect_a_frame_of_each():
    assert CLIPS.length == 539
    assert CLIPS.protected == (
        ("first_frame_1", 414, 477, False),
        ("first_frame_0", 477, 525, True),
        ("text_0", 525, 536, True),
        ("text_1", 536, 539, True),
    )
    assert CLIPS.order[381:414].tolist() == [*range(251, 271), *range(523, 536)], "audio"
    rows, columns = CLIPS.axis(539, 0), CLIPS.axis(539, 1)
    assert (rows.protected_from, columns.protected_from) == (477, 414)
    assert (rows.free_blocks, columns.free_blocks) == (477 // 16, 414 // 8)


def test_image_to_video_protects_its_first_and_last_frame():
    assert [r[:3] for r in FIRST_AND_LAST.protected] == [
        ("first_frame", 360, 450),
        ("last_frame", 450, 540),
        ("text", 540, 552),
    ]
    assert FIRST_AND_LAST.order[360:].tolist() == [*range(90), *range(450, 552)]
    assert BOTH_OF_TWO.order.tolist() == [*range(30, 60), *range(30)]
    assert [(*r[:2], r.rows) for r in BOTH_OF_TWO.protected] == [("last_frame", 0, False), ("first_frame", 30, True)]
    assert (BOTH_OF_TWO.axis(60, 0).free_blocks, BOTH_OF_TWO.axis(60, 1).free_blocks) == (3, 0)


@pytest.mark.parametrize(
    ("parts", "ordered"),
    [
        ((), False),
        ((Tokens(9),), False),
        ((Text(9),), False),
        ((Tokens(9), Tokens(2), Text(3), Text(1)), False),
        ((Text(3), Tokens(9)), True),
        ((Tokens(9), Text(3), Tokens(9)), True),
        ((Grid(1, 1, 9),), True),
    ],
)
def test_only_grids_and_text_before_other_tokens_need_an_order(parts, ordered):
    layout = TokenLayout(parts=parts, block=4)
    assert layout.is_ordered is ordered
    if parts and not ordered:
        x = np.zeros((1, 1, layout.length))
        assert layout.to_blocks(x) is x
        assert layout.axis(layout.length, 0).protected_from == layout.length - layout.text


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (TokenLayout(), "no grid"),
        (TokenLayout((21, 45, 80)), "grid 21x45x80"),
        (TokenLayout((21, 45, 80), text=226), "grid 21x45x80 text=226@end"),
        (TokenLayout((1, 45, 80), text=226, text_position="start"), "grid 1x45x80 text=226@start"),
        (EDIT, "text 37 + grid 13x15 + grid 9x11 + grid 8x8"),
        (CLIPS, "text 11 + grid 5x6x8 + tokens 20 + grid 4x7x9 + tokens 13 + text 3"),
        (TokenLayout(parts=(Text(3),)), "text 3"),
        (TokenLayout(parts=(Text(3), Grid(2, 3, 4), Text(5))), "text 3 + grid 2x3x4 + text 5"),
        (TokenLayout(parts=[Tokens(1)] * 10), " + ".join(["tokens 1"] * 8) + " + 2 more parts"),
    ],
)
def test_layouts_print_as_people_write_them(layout, text):
    assert str(layout) == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"grid": (3, 4)}, r"grid=\(3, 4\) is not a tuple of 3"),
        ({"grid": (3, 0, 4)}, r"grid=0 is not allowed; give a whole number from 1"),
        ({"grid": (3, 2.5, 4)}, r"grid=2.5 is not an integer"),
        ({"grid": (3, True, 4)}, r"grid=True is not allowed"),
        ({"grid": (3, 4, 2**40)}, r"grid=1099511627776 is not allowed.*to 2147483647"),
        ({"grid": 48}, r"grid=48 is not a tuple of 3"),
        ({"text": 4}, r"text=4 needs a grid"),
        ({"window": (2, 8, 8)}, r"window=\(2, 8, 8\) needs a grid"),
        ({"grid": (3, 4, 4), "text": -1}, r"text=-1 is not allowed; give a whole number from 0"),
        ({"grid": (3, 4, 4), "text_position": "middle"}, r"text_position='middle' is not known.*'start', 'end'"),
        (
            {"grid": (3, 4, 4), "sink": "middle"},
            r"sink='middle' is not known.*'first_frame', .*'last_frame_keys', None",
        ),
        ({"grid": (3, 4, 4), "sink": np.zeros(3)}, r"sink=array\(.*\) is not known"),
        ({"grid": (3, 4, 4), "sink": {}}, r"sink=\{\} is not known"),
        ({"grid": (3, 4, 4), "sink": ("first_frame", None)}, r"sink=None is not known"),
        ({"grid": (3, 4, 4), "sink": (["first_frame"],)}, r"sink=\['first_frame'\] is not known"),
        ({"grid": (3, 4, 4), "sink": ("first_frame", "first_frame_keys")}, r"names a frame twice; give it once"),
        ({"sink": "middle"}, r"sink='middle' is not known"),
        ({"grid": "x"}, r"grid='x' is not a tuple of 3"),
        ({"grid": np.ones(3)}, r"grid=array\(.*\) is not a tuple of 3"),
        ({"grid": (3, 4, 10**5000)}, r"grid=<int> is not allowed"),
        ({"grid": (3, 4, 4), "text": "x" * 10**6}, r"text='x{76}\.\.\. is not an integer"),
        ({"grid": (3, 4, 4), "text_position": np.zeros(2)}, r"text_position=array\(.*\) is not known"),
        ({"grid": (3, 4, 4), "window": 8}, r"window=8 is not a tuple of 3"),
        ({"grid": (2**16, 2**16, 1)}, r"a grid of 65536x65536x1 has 4294967296 tokens; give at most 2147483647"),
        ({"grid": (2**15, 2**8, 2**7), "text": LARGEST}, r"the parts have 3221225471 tokens together; give at most"),
        ({"parts": 3}, r"parts=3 is not a tuple; give \(Text\(226\), Grid"),
        ({"parts": [(3, 4, 4)]}, r"\(3, 4, 4\) is not a part; give Grid\(frames, height, width\), Text\(n\) or Tokens"),
        ({"parts": [Text(1)] * 2000}, r"a layout of 2000 parts; give at most 1024"),
        ({"parts": [Text(4)], "grid": (3, 4, 4)}, r"give one form or the other"),
        ({"parts": [Text(4)], "text": 3}, r"give one form or the other"),
        ({"parts": [Grid(3, 4, 4)], "sink": None}, r"give one form or the other"),
        ({"parts": [Grid(3, 4, 4)], "sink": np.zeros(3)}, r"give one form or the other"),
        ({"parts": [Text(4)], "window": (2, 8, 8)}, r"window=\(2, 8, 8\) needs a grid"),
        ({"parts": [Grid(3, 4, 4, window=(2, 8, 9))]}, r"window=\(2, 8, 9\) holds 144 tokens.*multiple of 128"),
        ({"grid": (3, 4, 4), "window": (2, 8, 9)}, r"window=\(2, 8, 9\) holds 144 tokens.*multiple of 128, such as"),
        ({"grid": (3, 4, 4), "block": (128, 96), "window": (2, 8, 8)}, r"holds 128 tokens.*multiple of 384"),
        ({"grid": (3, 4, 4), "block": (1009, 1013 * 1019)}, r"windows of 1041537223 tokens.*least common multiple"),
        ({"block": 0}, r"block=0 is not allowed"),
        ({"block": (128,)}, r"block=\(128,\) is not a tuple of 2"),
        ({"block": "128"}, r"block='128' is not an integer"),
    ],
)
def test_what_describes_no_layout_is_refused_by_name(arguments, said):
    with pytest.raises(LayoutError, match=said):
        TokenLayout(**arguments)


@pytest.mark.parametrize(
    ("part", "arguments", "said"),
    [
        (Text, (-1,), r"text=-1 is not allowed"),
        (Tokens, ("3",), r"tokens='3' is not an integer"),
        (Grid, (0, 1, 1), r"frames=0 is not allowed"),
        (Grid, (1, None, 1), r"height=None is not an integer"),
    ],
)
def test_a_part_is_checked_where_it_is_written(part, arguments, said):
    with pytest.raises(LayoutError, match=said):
        part(*arguments)
