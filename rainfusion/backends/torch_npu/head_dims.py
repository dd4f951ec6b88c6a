"""Head dims that the block-sparse operators have, and the way there: zeros, which change nothing.

A channel that is zero in q and k adds nothing to a logit; one that is zero in v makes an output that is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import pad

HEAD_DIMS = (64, 128)


def beyond(head_dim: int) -> Iterator[str]:
    """An objection where `head_dim` cannot be padded."""
    if head_dim > HEAD_DIMS[-1]:
        yield f"no head dim {head_dim} (at most {HEAD_DIMS[-1]})"


def padded(x: Tensor) -> Tensor:
    """Zeros appended to the channels of ``[..., D]`` up to the next head dim."""
    missing = next(dim for dim in HEAD_DIMS if dim >= x.shape[-1]) - x.shape[-1]
    return pad(x, (0, missing)) if missing else x
