"""How far sparse videos are from the dense ones of the same noise: a number a video."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def compared(outputs: Tensor, dense: Tensor) -> dict[str, list[float]]:
    """Every metric of every video.

    Args:
        outputs, dense: ``[B, 3, F, H, W]`` in [-1, 1] before clamping.

    Returns:
        ``relative_l1``; ``psnr`` in dB, ``ssim`` and ``cosine`` of the pictures; ``temporal``, the mean absolute
        difference between changes from frame to frame, over that of the dense video.
    """
    a, b = ((x.float().clamp(-1, 1) + 1) / 2 for x in (outputs, dense))
    change, expected = a.diff(dim=2), b.diff(dim=2)
    return {
        "relative_l1": _list((outputs - dense).abs().flatten(1).sum(1) / dense.abs().flatten(1).sum(1)),
        "psnr": psnr(outputs, dense),
        "ssim": _list(_ssim(a, b)),
        "cosine": _list(torch.nn.functional.cosine_similarity(outputs.float().flatten(1), dense.float().flatten(1))),
        "temporal": _list((change - expected).abs().flatten(1).sum(1) / expected.abs().flatten(1).sum(1)),
    }


def psnr(outputs: Tensor, truth: Tensor) -> list[float]:
    """In dB, of every video against the truth; at most 100."""
    error = ((outputs.float().clamp(-1, 1) - truth.float().clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return _list(-10 * error.clamp(min=1e-10).log10())


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    frames = a.shape[2]
    by_frame = structural_similarity_index_measure(
        a.transpose(1, 2).flatten(0, 1), b.transpose(1, 2).flatten(0, 1), data_range=1.0, reduction="none"
    )
    assert isinstance(by_frame, Tensor)
    return by_frame.unflatten(0, (-1, frames)).mean(1)


def _list(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
