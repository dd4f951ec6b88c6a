import os
import shutil
import struct
import wave

import av
import numpy as np
import pytest

from rainfusion.demo import decode
from rainfusion.demo.decode import ClipError


def write_video(path, count, height=48, width=64):
    """A video whose frames brighten from black: frame i has the grey value 20 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(count):
            grey = np.full((height, width, 3), 20 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "rising.mp4", 12)


@pytest.mark.parametrize("name", decode.SHIPPED)
def test_shipped_clips_decode_to_the_grid(name):
    frames = decode.load(name, (2, 3, 5))
    assert frames.shape == (2, 48, 80, 3)
    assert frames.dtype == np.uint8
    assert frames.std() > 10


@pytest.mark.parametrize(("frames", "stride"), [(3, 4), (4, 3), (5, 2), (12, 1), (1, 1)])
def test_every_fourth_frame_or_fewer_where_the_clip_is_short(video, frames, stride):
    greys = decode.decode(video, (frames, 2, 2)).mean(axis=(1, 2, 3))
    assert np.allclose(greys, 20 * stride * np.arange(frames), atol=4)


def test_start_is_the_first_frame_taken(video):
    assert np.allclose(decode.load(video, (1, 2, 2), start=6).mean(), 120, atol=4)


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 2, 8), (1, 6, 2)])
def test_the_crop_is_centred_and_keeps_the_aspect(tmp_path, grid):
    marked = np.zeros((48, 96, 3), dtype=np.uint8)
    marked[16:32, 40:56] = 255
    with av.open(str(tmp_path / "mark.avi"), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = 48, 96, "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(marked, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    frame = decode.decode(tmp_path / "mark.avi", grid)[0, :, :, 0] > 127
    rows, columns = np.flatnonzero(frame.any(axis=1)), np.flatnonzero(frame.any(axis=0))
    assert len(rows) == pytest.approx(len(columns), abs=2)
    assert rows.mean() == pytest.approx((frame.shape[0] - 1) / 2, abs=1)
    assert columns.mean() == pytest.approx((frame.shape[1] - 1) / 2, abs=1)


def test_a_short_clip_is_an_error_that_says_what_to_do(video):
    with pytest.raises(ClipError, match="has 12 frames, the grid takes 13"):
        decode.decode(video, (13, 2, 2))
    with pytest.raises(ClipError, match="has 2 frames from frame 10 on"):
        decode.decode(video, (3, 2, 2), start=10)


def test_no_such_clip():
    with pytest.raises(ClipError, match="give the path of a video, or one of bikes, bigbuckbunny, carphone"):
        decode.locate("nothing.mp4")


@pytest.mark.parametrize("content", [b"", b"this is no video" * 99])
def test_not_a_video(tmp_path, content):
    path = tmp_path / "text.mp4"
    path.write_bytes(content)
    with pytest.raises(ClipError, match="cannot be decoded as a video"):
        decode.decode(path, (2, 2, 2))


@pytest.mark.parametrize(("package", "call"), [("av", decode.load), ("skvideo", decode.load)])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, package, call):
    monkeypatch.setattr(decode, "find_spec", lambda name: None if name == package else object())
    if package == "av":
        monkeypatch.setattr(decode, "locate", lambda clip: clip)
    with pytest.raises(ClipError, match=r"not installed; pip install 'rainfusion\[demo\]'"):
        call("bikes", (2, 2, 2))


def test_frames_that_no_machine_can_hold_are_refused(video):
    with pytest.raises(ClipError, match=r"1x99999x99999 take .* bytes; give a grid that needs at most 8 GiB"):
        decode.decode(video, (1, 99999, 99999))


def turned(path, to, matrix):
    """A copy of an MP4 file whose film is shown by another matrix (a, b, c, d)."""
    content, size = path.read_bytes(), struct.calcsize(">9i")
    a, b, c, d = (65536 * n for n in matrix)
    at = content.index(struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), content.index(b"tkhd"))
    shown = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    to.write_bytes(content[:at] + shown + content[at + size :])
    return to


@pytest.mark.parametrize(
    ("matrix", "look"),
    [
        ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, -1), lambda x: x[::-1, ::-1]),
        ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
        ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    ],
    ids=["a quarter right", "a quarter left", "upside down", "mirrored", "over the diagonal"],
)
def test_a_film_is_taken_as_it_is_shown(tmp_path, matrix, look):
    path = tmp_path / "corner.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:16, :32] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    height, width = look(picture[..., 0]).shape
    frames = decode.load(turned(path, tmp_path / "turned.mp4", matrix), (1, height // 16, width // 16))
    assert np.abs(frames[0].astype(int) - look(picture)).mean() < 9


@pytest.mark.parametrize("name", ["12:30.mp4", "file:a.mp4", "http:a.mp4", "-a.mp4", "a\nb.mp4", "%03d.mp4", " .mp4"])
def test_a_name_is_a_name_whatever_its_letters(video, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(video, tmp_path / name)
    assert decode.load(name, (2, 3, 4)).shape == (2, 48, 64, 3)


def test_of_several_streams_the_largest_is_taken(tmp_path):
    with av.open(str(tmp_path / "two.mp4"), "w") as container:
        for n in (1, 2):
            stream = container.add_stream("mpeg4", rate=24)
            stream.height, stream.width, stream.pix_fmt = 32 * n, 32 * n, "yuv420p"
        for n, stream in enumerate(container.streams.video, 1):
            grey = np.full((32 * n, 32 * n, 3), 100 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
            container.mux(stream.encode())
    assert decode.load(tmp_path / "two.mp4", (1, 2, 2)).mean() == pytest.approx(200, abs=5)


def test_sound_alone_is_no_clip(tmp_path):
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    with pytest.raises(ClipError, match="has no pictures, only audio"):
        decode.load(tmp_path / "sound.wav", (1, 2, 2))


def test_only_regular_files_are_opened(video, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", "/dev/zero", "a\0b", "x" * 5000, ""):
        for use in (decode.load, decode.decode):
            with pytest.raises((ClipError, OSError)):
                use(path, (1, 2, 2))
        with pytest.raises(ClipError, match="give the path of a video"):
            decode.load(path, (1, 2, 2))


def test_playlists_open_nothing(video, tmp_path):
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {video}\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{video}\n#EXT-X-ENDLIST\n")
    for name in ("list.ffconcat", "list.m3u8"):
        with pytest.raises(ClipError, match="cannot be decoded as a video"):
            decode.load(tmp_path / name, (1, 3, 4))


@pytest.mark.parametrize("start", [-1, 2**70, 1.5, "1"])
def test_a_start_that_is_none(video, start):
    with pytest.raises(ClipError, match="start="):
        decode.load(video, (1, 3, 4), start=start)
