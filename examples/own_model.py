"""A model of one's own, described by an adapter.

pip install 'rainfusion[diffusers]'
python examples/own_model.py           # 16,384 tokens of video
python examples/own_model.py --tiny    # 320 tokens
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from rainfusion.integrations.diffusers import REST, Adapter, Grid, apply_rainfusion, register_adapter


class Processor:
    """What an attention module computes, as diffusers has it: an object that the module keeps as `processor`."""

    def __call__(self, attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Self-attention of ``[batch, tokens, channels]``."""
        q, k, v = (y.unflatten(2, (attention.heads, -1)).transpose(1, 2) for y in attention.qkv(x).chunk(3, dim=2))
        return attention.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """A self-attention module."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.processor = Processor()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the processor computes."""
        return self.processor(self, x)


class OwnTransformer(nn.Module):
    """Video ``[batch, channels, frames, height, width]`` and text ``[batch, tokens, channels]`` in one sequence."""

    def __init__(self, channels: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(channels, heads=2) for _ in range(layers))

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The video after all blocks."""
        x = torch.cat([video.flatten(2).mT, text], dim=1)
        for block in self.blocks:
            x = x + block(x)
        return x[:, : -text.shape[1]].mT.reshape(video.shape)


register_adapter(
    OwnTransformer,
    Adapter(
        layers=r"blocks\.\d+",  # the modules that are self-attention, by name
        parts=lambda model, arguments: (Grid(*arguments["video"].shape[2:]), REST),  # the sequence: video, then text
        call="sdpa",  # the processors call torch's own function
    ),
)


def main() -> None:
    """Run the model twice, dense and sparse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="320 tokens instead of 16,384")
    args = parser.parse_args()

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = OwnTransformer().to(device).eval()
    shape, settings = ((5, 8, 8), {"block": 16, "min_blocks": 0, "sink": None}) if args.tiny else ((16, 32, 32), {})
    video, text = torch.randn(1, 64, *shape, device=device), torch.randn(1, 20, 64, device=device)

    with torch.no_grad():
        dense = model(video, text)
        with apply_rainfusion(model, sparsity=0.5, **settings) as handle:
            sparse = model(video, text)
    print(handle.report())
    print(f"relative L1 to dense: {(sparse - dense).abs().sum() / dense.abs().sum():.3f}")
    handle.report().heatmap("own_model_density.png")


if __name__ == "__main__":
    main()
