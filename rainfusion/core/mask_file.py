"""Files of block masks: an ``.npz`` with a JSON header and packed bits, read without trusting it.

Nothing is unpickled, every value is checked, and memory is bounded whatever the file says about itself.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from rainfusion.core.checks import shown
from rainfusion.core.errors import MaskError
from rainfusion.core.files import IrregularFileError, as_path, open_regular
from rainfusion.core.layout import TokenLayout

_VERSION = 2  # 1 had no layout

# The most that a member may unpack to; a file is compressed, so its own size bounds nothing. 2**28 bytes are
# 2**31 block pairs: 64 heads of 700 000 tokens in blocks of 128.
_MOST_BYTES = {"header": 2**16, "bits": 2**28}

# zipfile reads the whole directory of an archive at once. Two members need about 120 bytes.
_MOST_DIRECTORY_BYTES = 2**12


_END_OF_ARCHIVE = struct.Struct("<4s4xHHI4xH")  # signature, members here, members, directory bytes, comment bytes
_ZIP64_LOCATOR_BYTES = 20

Loaded = TypeVar("Loaded")


def write(
    path: str | PathLike[str],
    bits: np.ndarray,
    q_len: int,
    kv_len: int,
    block: tuple[int, int],
    layout: TokenLayout | None,
) -> None:
    """Write packed bits and what describes them.

    Raises:
        MaskError: no path, or a mask that `read` would refuse for its size.
        OSError: the file cannot be written.
    """
    header = {
        "version": _VERSION,
        "q_len": q_len,
        "kv_len": kv_len,
        "block": block,
        "layout": None if layout is None else layout.to_dict(),
    }
    members = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), "bits": bits}
    for name, content in members.items():
        if content.nbytes + 128 > _MOST_BYTES[name]:  # an npy header is 128 bytes
            raise MaskError(f"the {name} of this mask takes {content.nbytes} bytes; files hold {_MOST_BYTES[name]}")
    with _checked_path(path).open("wb") as file:
        np.savez_compressed(file, header=members["header"], bits=members["bits"])


def read(path: str | PathLike[str], build: Callable[[np.ndarray, Any, Any, Any, TokenLayout | None], Loaded]) -> Loaded:
    """What `build` makes of the content of a file: ``build(bits, q_len, kv_len, block, layout)``.

    `build` checks the bits and the sizes; here only their form in the file is checked.

    Raises:
        MaskError: not a regular file, not a mask, another version, or content that `build` refuses.
        OSError: no such file, or it may not be read.
    """
    place = _checked_path(path)
    try:
        opened = open_regular(place)
    except IrregularFileError as error:
        raise MaskError(f"{error}; give the path of a mask written with BlockMask.save") from error
    with opened as file:
        try:
            return build(*_content(file))
        except Exception as error:  # zipfile, zlib and NumPy fail on a damaged file in ways none of them lists
            raise MaskError(
                f"{place} is not a rainfusion block mask ({str(error)[:300]}); write one with BlockMask.save"
            ) from error


def _checked_path(path: Any) -> Path:
    try:
        return as_path(path)
    except IrregularFileError as error:
        raise MaskError(str(error)) from None


def _content(file: IO[bytes]) -> tuple[np.ndarray, Any, Any, Any, TokenLayout | None]:
    _refuse_long_directory(file)
    with zipfile.ZipFile(file) as archive:
        header = json.loads(_member(archive, "header").tobytes())
        version = header["version"]
        if type(version) is not int or not 1 <= version <= _VERSION:
            raise MaskError(f"mask format {shown(version)}; this rainfusion reads 1 to {_VERSION}")
        written = header["layout"] if version > 1 else None
        layout = None if written is None else TokenLayout.from_dict(written)
        return _member(archive, "bits"), header["q_len"], header["kv_len"], header["block"], layout


def _refuse_long_directory(file: IO[bytes]) -> None:
    """Look at the end of the archive, which NumPy writes without a comment and without the 64-bit extension."""
    file.seek(-_END_OF_ARCHIVE.size - _ZIP64_LOCATOR_BYTES, os.SEEK_END)
    locator = file.read(_ZIP64_LOCATOR_BYTES)
    signature, _, members, size, comment = _END_OF_ARCHIVE.unpack(file.read(_END_OF_ARCHIVE.size))
    if signature != b"PK\x05\x06" or comment or locator.startswith(b"PK\x06\x07"):
        raise MaskError("it does not end as an npz file does")
    if members > len(_MOST_BYTES) or size > _MOST_DIRECTORY_BYTES:
        raise MaskError(f"it has {members} members in a directory of {size} bytes; a mask has {len(_MOST_BYTES)}")


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One uint8 array of an npz file."""
    stream = io.BytesIO(_unpacked(archive, name))
    if np.lib.format.read_magic(stream) != (1, 0):
        raise MaskError(f"{name} has another array format than NumPy 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    data = stream.getbuffer()[stream.tell() :]
    if dtype != np.uint8 or fortran or any(n < 0 for n in shape) or math.prod(shape) != len(data):
        raise MaskError(f"{name} is {dtype} {shape} in {len(data)} bytes; it must be uint8 in C order")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a member, never more than the directory states or the limit allows.

    Only stored and deflated members: the other methods of zipfile unpack a piece without a bound.
    """
    info, limit = archive.getinfo(f"{name}.npy"), _MOST_BYTES[name]
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise MaskError(f"{name} is compressed by method {info.compress_type}; NumPy writes stored or deflated members")
    if info.file_size > limit:
        raise MaskError(f"{name} unpacks to {info.file_size} bytes; at most {limit} are read")
    with archive.open(info) as stream:
        content = stream.read(info.file_size + 1)
    if len(content) != info.file_size:
        raise MaskError(f"{name} has {len(content)} bytes where its directory states {info.file_size}")
    return content
