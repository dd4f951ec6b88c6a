"""The order in which query blocks are started: heavy rows first, so that none of them is left for the end.

The first frame's rows keep every key block, several times what others keep; started last, they would run alone.
Rows of about the same length stay together head by head, so that the programs of a moment share one head's keys.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def heavy_first(counts: np.ndarray, sequences: int, device: torch.device) -> Tensor:
    """Query blocks of `sequences` (batch times heads) equal sequences, by the kept blocks of one.

    Args:
        counts: int ``[q blocks]``.

    Returns:
        int32 ``[sequences * q blocks]``, numbered as in ``[batch, heads, q blocks]``.
    """
    weight = np.tile(np.log2(np.maximum(counts, 1)).astype(np.int64), sequences)
    return torch.tensor(np.argsort(-weight, kind="stable"), dtype=torch.int32, device=device)


def heavy_first_on_device(counts: Tensor) -> Tensor:
    """The same from counts that only the device knows, int32 ``[rows]``; nothing waits for the host."""
    weight = torch.log2(counts.clamp(min=1).float()).to(torch.uint8)
    return torch.sort(weight, descending=True, stable=True)[1].to(torch.int32)
