"""A model that rainfusion does not know, as users write it, and its adapter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from rainfusion.integrations.diffusers import REST, Adapter, Grid


class Attention(nn.Module):
    """Self-attention as an own model may have it: a processor that calls torch's function."""

    def __init__(self, processor):
        super().__init__()
        self.heads, self.qkv, self.processor = 2, nn.Linear(32, 96), processor

    def forward(self, x, mask=None):
        return self.processor(self, x, mask)


class Processor:
    dropout = 0.0

    def __call__(self, attn, x, mask=None):
        q, k, v = (y.unflatten(2, (attn.heads, -1)).transpose(1, 2) for y in attn.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, mask, self.dropout).transpose(1, 2).flatten(2)


class Own(nn.Module):
    """A model of a 2 x 8 x 8 grid and some text, of which a mask hides the end."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention(Processor()) for _ in range(2))

    def forward(self, tokens, mask=None, timestep=None):
        for block in self.blocks:
            tokens = tokens + block(tokens, mask)
        return tokens


def own_model():
    torch.manual_seed(0)
    return Own().eval()


OWN = Adapter(r"blocks\.\d+", lambda model, arguments: (Grid(2, 8, 8), REST), call="sdpa", pads=True)
