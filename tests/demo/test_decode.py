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
