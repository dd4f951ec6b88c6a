"""Linear layers in FP8, as small as they can be: one scale for each output row, one for each token.

A stand-in for a quantisation library where there is none. Weights are quantised once; the scale of a token is taken
when the layer runs, which torch.compile fuses with what comes before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
CAPABILITY = (8, 9)
LEAST_SCALE = 1e-12  # of a row of zeros, which has none of its own


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as FP8, and the float32 scale of each, ``[rows, 1]``: their product is the row, rounded."""
    scale = (rows.abs().amax(dim=-1, keepdim=True).float() / LARGEST).clamp(min=LEAST_SCALE)
    return (rows.float() / scale).to(FP8), scale


class Float8Linear(nn.Module):
    """A bfloat16 `nn.Linear` that multiplies FP8 numbers and rounds the scaled sum to bfloat16.

    Takes ``[..., in_features]``; both numbers of features are multiples of 16. On a CUDA device it needs compute
    capability 8.9 or later, and sums with Hopper's fast accumulation, which is less exact than float32.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantised(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t())  # [1, out_features]
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = quantised(x.flatten(0, -2))
        out = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out.unflatten(0, x.shape[:-1])


class Float8Layers:
    """FP8 twins of all linear layers of a model's blocks; the layers themselves stay in memory.

    Args:
        blocks: of a diffusion transformer. In Wan's they are the projections of self-attention and cross-attention and
            the feed-forward layers. Norms and embeddings are none.

    Raises:
        ValueError: there is no linear layer, one is not bfloat16, or the CUDA device multiplies no FP8 numbers.
    """

    def __init__(self, blocks: nn.Module) -> None:
        self._twins: list[tuple[nn.Module, str, nn.Linear, Float8Linear]] = []
        for parent in blocks.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    _check(name, child.weight)
                    self._twins.append((parent, name, child, Float8Linear(child)))
        if not self._twins:
            raise ValueError("the blocks have no linear layer; give those of a transformer")

    def __len__(self) -> int:
        return len(self._twins)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The model computes with FP8 layers for a while."""
        for parent, name, _, twin in self._twins:
            setattr(parent, name, twin)
        try:
            yield
        finally:
            for parent, name, linear, _ in self._twins:
                setattr(parent, name, linear)


def _check(name: str, weight: Tensor) -> None:
    if weight.dtype != torch.bfloat16:
        raise ValueError(f"{name} is {weight.dtype}; give a model in torch.bfloat16")
    if weight.is_cuda and (found := torch.cuda.get_device_capability(weight.device)) < CAPABILITY:
        raise ValueError(f"this CUDA device has compute capability {found}; FP8 needs {CAPABILITY} or later")
