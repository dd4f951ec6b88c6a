"""The clip inside the conformance kit is the clip it says it is."""

import numpy as np
import pytest

from rainfusion.demo.decode import locate
from rainfusion.testing.inputs import CLIP


def brightness() -> np.ndarray:
    """Every fourth of 45 frames of bigbuckbunny: the decoded luma, cropped to 16:10, in means of 9x9 pixels."""
    av = pytest.importorskip("av")
    frames = []
    with av.open(str(locate("bigbuckbunny"))) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % 4 == 0:
                luma = frame.to_ndarray()[: frame.height, 64:-64]  # yuv420p: the luma plane comes first
                frames.append(luma.reshape(80, 9, 128, 9).sum(axis=(1, 3), dtype=np.int64) // 81)
            if len(frames) == 12:
                return np.stack(frames).astype(np.uint8)
    raise AssertionError("the clip is shorter than it was")


def test_the_clip_of_the_kit_is_made_of_big_buck_bunny():
    with CLIP.open("rb") as file:
        assert np.array_equal(np.load(file)["frames"], brightness())
