# SPDX-License-Identifier: Apache-2.0
"""Prompts in a hand-written vision transformer whose blocks use nn.MultiheadAttention: convert, freeze, train."""

import torch
from stripes import train
from torch import nn

import fastprompt


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        # This line was: self.attn(h, h, h, need_weights=False)[0]
        x = x + self.attn(h)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, depth: int = 3, patch: int = 8, size: int = 32):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def main() -> None:
    torch.manual_seed(0)
    # Random weights here; load your own checkpoint before the conversion, or after it (the names change).
    model = VisionTransformer()
    model.requires_grad_(False)
    for block in model.blocks:
        block.attn = fastprompt.nn.PromptAttention.from_multihead(block.attn, length=8)
    model.head.requires_grad_(True)
    train(model)


if __name__ == "__main__":
    main()
