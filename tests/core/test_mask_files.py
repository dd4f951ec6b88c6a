"""A mask file may come from anywhere. What is not a mask is refused, with little memory and one kind of error."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import tracemalloc
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rainfusion.core import mask_file
from rainfusion.core.errors import MaskError
from rainfusion.core.layout import TokenLayout
from rainfusion.core.mask import BlockMask

HEADER = {"version": 2, "q_len": 60, "kv_len": 60, "block": [8, 8], "layout": None}
LAYOUT = TokenLayout((3, 3, 6), text=6, block=8)


@pytest.fixture(scope="module")
def mask():
    blocks = np.random.default_rng(0).random((2, 3, 8, 8)) < 0.5
    blocks[0, 1, 2] = False  # a row that keeps nothing
    return BlockMask(blocks, 60, 60, (8, 8), LAYOUT)


@pytest.fixture(scope="module")
def saved(mask, tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "mask.npz"
    mask.save(path)
    return path


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), allow_pickle=True)
    return stream.getvalue()


def header(**changes) -> bytes:
    return npy(np.frombuffer(json.dumps(HEADER | changes).encode(), dtype=np.uint8))


def array_header(text: str) -> bytes:
    """An npy file with this header and no data."""
    encoded = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded


GOOD_BITS = npy(np.full((2, 3, 8, 1), 255, dtype=np.uint8))


def written(path, **members: bytes):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def test_a_file_gives_the_mask_back(mask, saved):
    loaded = BlockMask.load(saved)
    assert (loaded.q_len, loaded.kv_len, loaded.block) == (60, 60, (8, 8))
    assert loaded.layout == mask.layout == LAYOUT
    np.testing.assert_array_equal(loaded.blocks, mask.blocks)
    with np.load(saved, allow_pickle=False) as file:  # an ordinary npz, for other tools
        assert sorted(file) == ["bits", "header"]


@pytest.mark.parametrize("layout", [None, TokenLayout(block=8), TokenLayout((1, 5, 7), text=5, block=8)], ids=str)
def test_a_torch_mask_and_any_layout_come_back(tmp_path, layout):
    blocks = torch.rand(1, 2, 5, 5) < 0.5
    BlockMask(blocks, 40, 40, (8, 8), layout).save(str(tmp_path / "mask.npz"))
    loaded = BlockMask.load(str(tmp_path / "mask.npz"))
    assert loaded.layout == layout
    np.testing.assert_array_equal(loaded.blocks, blocks.numpy())


def test_a_file_of_version_1_is_read(tmp_path, mask):
    """As 0.1 wrote it: no layout."""
    text = {name: HEADER[name] for name in ("q_len", "kv_len", "block")} | {"version": 1}
    path = tmp_path / "mask.npz"
    np.savez_compressed(path, header=np.frombuffer(json.dumps(text).encode(), np.uint8), bits=mask.to_bits())
    loaded = BlockMask.load(path)
    np.testing.assert_array_equal(loaded.blocks, mask.blocks)
    assert loaded.layout is None


def test_a_file_as_numpy_stores_it_without_compression_is_read(tmp_path, mask):
    path = tmp_path / "mask.npz"
    np.savez(path, header=np.frombuffer(json.dumps(HEADER).encode(), np.uint8), bits=mask.to_bits())
    np.testing.assert_array_equal(BlockMask.load(path).blocks, mask.blocks)


@pytest.mark.parametrize("path", [None, 0, b"mask.npz", io.BytesIO(), "a\0b", ""], ids=lambda path: type(path).__name__)
def test_what_is_no_path_is_refused(mask, path):
    for use in (BlockMask.load, mask.save):
        with pytest.raises(MaskError, match="is not the path of a file"):
            use(path)


def test_only_regular_files_are_opened(tmp_path, saved):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "."):
        with pytest.raises(MaskError, match="is not a regular file"):
            BlockMask.load(path)
    (tmp_path / "link.npz").symlink_to(saved)
    assert BlockMask.load(tmp_path / "link.npz").q_len == 60


def test_a_mask_too_large_to_be_read_again_is_not_written(tmp_path, mask, monkeypatch):
    for name in ("header", "bits"):
        with monkeypatch.context() as patch:
            patch.setitem(mask_file._MOST_BYTES, name, 150)
            with pytest.raises(MaskError, match=f"the {name} of this mask takes"):
                mask.save(tmp_path / "mask.npz")
    assert not (tmp_path / "mask.npz").exists()


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        BlockMask.load(tmp_path / "nowhere.npz")


class Bomb:
    """Unpickling this would raise something that is no MaskError."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"header": header(), "bits": npy(np.array([Bomb()], dtype=object))}, "bits is object"),
        ({"header": npy(np.array([Bomb()], dtype=object)), "bits": GOOD_BITS}, "header is object"),
        ({"header": pickle.dumps(Bomb()), "bits": GOOD_BITS}, "magic"),
        ({"bits": GOOD_BITS}, "no item named"),
        ({"header": header()}, "no item named"),
        ({"header": header(version=3), "bits": GOOD_BITS}, "mask format 3; this rainfusion reads 1 to 2"),
        ({"header": header(version=True), "bits": GOOD_BITS}, "mask format True"),
        ({"header": header(version="2"), "bits": GOOD_BITS}, "mask format '2'"),
        ({"header": header(layout="x"), "bits": GOOD_BITS}, ""),
        ({"header": header(layout={}), "bits": GOOD_BITS}, ""),
        ({"header": header(layout=LAYOUT.to_dict() | {"block": [4, 4]}), "bits": GOOD_BITS}, "layout has blocks of"),
        ({"header": header(layout=LAYOUT.to_dict() | {"block": [0, 8]}), "bits": GOOD_BITS}, ""),
        ({"header": header(q_len=-60), "bits": GOOD_BITS}, "q_len=-60 is not allowed"),
        ({"header": header(q_len=61.0), "bits": GOOD_BITS}, "q_len=61.0 is not an integer"),
        ({"header": header(q_len=10**30), "bits": GOOD_BITS}, "q_len=1000000"),
        ({"header": header(kv_len=float("inf")), "bits": GOOD_BITS}, "kv_len=inf is not an integer"),
        ({"header": header(kv_len=2**31 - 1), "bits": GOOD_BITS}, "need .batch, heads, 8, 33554432"),
        ({"header": header(q_len=2**31 - 1), "bits": GOOD_BITS}, "need .batch, heads, 268435456"),
        ({"header": header(block=[8, 0]), "bits": GOOD_BITS}, "block=0 is not allowed"),
        ({"header": header(block=[8]), "bits": GOOD_BITS}, "is not a pair"),
        ({"header": header(block=8), "bits": GOOD_BITS}, "is not a pair"),
        ({"header": npy(np.frombuffer(b"[1, 2]", dtype=np.uint8)), "bits": GOOD_BITS}, "indices must be integers"),
        ({"header": npy(np.frombuffer(b"{", dtype=np.uint8)), "bits": GOOD_BITS}, "Expecting property name"),
        ({"header": npy(np.frombuffer(b"[" * 4000, dtype=np.uint8)), "bits": GOOD_BITS}, ""),
        ({"header": npy(np.array(json.dumps(HEADER))), "bits": GOOD_BITS}, "header is <U"),
        ({"header": header(), "bits": npy(np.full((2, 3, 8, 1), 255))}, "bits is int64"),
        ({"header": header(), "bits": npy(np.full((2, 3, 8), 255, np.uint8))}, "need .batch, heads, 8, 1"),
        ({"header": header(), "bits": npy(np.full((2, 3, 7, 1), 255, np.uint8))}, "need .batch, heads, 8, 1"),
        ({"header": header(), "bits": npy(np.full((0, 3, 8, 1), 255, np.uint8))}, r"shape \(0, 3, 8, 1\)"),
        ({"header": header(kv_len=50), "bits": GOOD_BITS}, "bits beyond key block 6"),
        ({"header": header(), "bits": GOOD_BITS[:-1]}, "in 47 bytes"),
        ({"header": header(), "bits": GOOD_BITS + b"\0"}, "in 49 bytes"),
        (
            {
                "header": header(),
                "bits": array_header("{'descr': '|u1', 'fortran_order': False, 'shape': (99999, 99999, 8, 1), }"),
            },
            "in 0 bytes",
        ),
        (
            {"header": header(), "bits": array_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,), }")},
            "",
        ),
        (
            {"header": header(), "bits": array_header("__import__('os').abort()")},
            "malformed node or string",
        ),
        ({"header": header(), "bits": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"}, "another array format"),
        ({"header": header(), "bits": b"\x93NUMPY\x01\x00\xff\xff"}, "EOF"),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path, members, said):
    with pytest.raises(MaskError, match=f"(?s)is not a rainfusion block mask .*{said}"):
        BlockMask.load(written(tmp_path / "mask.npz", **members))


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip file at all", npy(np.ones(3)), pickle.dumps(Bomb())])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "mask.npz"
    path.write_bytes(content)
    with pytest.raises(MaskError, match="is not a rainfusion block mask"):
        BlockMask.load(path)


def test_a_decompression_bomb_is_refused_before_memory_is_taken(tmp_path):
    """A small file that unpacks to 320 MiB, in its bits or in its header."""
    path = tmp_path / "mask.npz"
    for name in ("bits", "header"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            if name == "bits":
                archive.writestr("header.npy", header())
            with archive.open(f"{name}.npy", "w") as file:
                for _ in range(320):
                    file.write(bytes(2**20))
        tracemalloc.start()
        with pytest.raises(MaskError, match=r"unpacks to .* bytes; at most"):
            BlockMask.load(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**22


def peak_of_refusing(path, said: str) -> int:
    """Bytes of memory that it takes to refuse a file."""
    tracemalloc.start()
    with pytest.raises(MaskError, match=f"(?s)is not a rainfusion block mask .*{said}"):
        BlockMask.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def rewritten(path, member: str, **fields: int):
    """The archive with other numbers in the directory entry of a member (and no such care in its local header)."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    while content[entry + 46 : entry + 46 + len(member)] != member.encode():
        entry = content.index(b"PK\x01\x02", entry + 4)
    for name, value in fields.items():
        at, size = {"method": (10, 2), "packed": (20, 4), "unpacked": (24, 4)}[name]
        content[entry + at : entry + at + size] = value.to_bytes(size, "little")
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("stated", [100, 176, 2**20])
def test_a_directory_that_lies_about_a_size_does_not_open_the_way_to_memory(tmp_path, stated):
    """300 MiB of zeros deflated into a member of which the directory states far less."""
    path = written(tmp_path / "mask.npz", header=header(), bits=GOOD_BITS + bytes(300 * 2**20))
    assert peak_of_refusing(rewritten(path, "bits.npy", unpacked=stated), "") < 2**23


def test_a_directory_that_states_more_than_there_is_is_refused(tmp_path):
    path = written(tmp_path / "mask.npz", header=header(), bits=GOOD_BITS)
    assert peak_of_refusing(rewritten(path, "bits.npy", unpacked=2**28), "") < 2**23


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_a_bound_are_refused(tmp_path, method):
    path = tmp_path / "mask.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("header.npy", header())
        archive.writestr("bits.npy", GOOD_BITS + bytes(2**26))
    rewritten(path, "bits.npy", unpacked=100)
    assert peak_of_refusing(path, f"header is compressed by method {method}") < 2**22


def test_a_long_directory_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "mask.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.npy", header())
        archive.writestr("bits.npy", GOOD_BITS)
        for i in range(20000):
            archive.writestr(str(i), b"")
    assert peak_of_refusing(path, "it has 20002 members") < 2**20
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    content[end + 8 : end + 16] = struct.pack("<HHI", 2, 2, 120)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 1)
    path.write_bytes(content[:end] + locator + content[end:])
    assert peak_of_refusing(path, "does not end as an npz file does") < 2**20


def refused_or_read(path, content: bytes) -> None:
    """Loading gives a mask that is in order, or a MaskError; nothing else."""
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(MaskError):
        BlockMask.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16, "more than 64 MiB for a tiny file"


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_flipped_bits_are_refused_or_harmless(saved, seed, flips):
    damaged, chance = bytearray(saved.read_bytes()), random.Random(seed)
    for _ in range(flips):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    refused_or_read(saved.with_name("flipped.npz"), bytes(damaged))


def test_a_truncated_file_is_refused_wherever_it_ends(saved):
    content, path = saved.read_bytes(), saved.with_name("truncated.npz")
    for stop in range(len(content)):
        path.write_bytes(content[:stop])
        with pytest.raises(MaskError):
            BlockMask.load(path)
