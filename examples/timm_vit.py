# SPDX-License-Identifier: Apache-2.0
"""Prompts in a vision transformer of timm: replace the attention of its blocks, freeze, train."""

import sys

import torch
from stripes import train

import fastprompt

try:
    import timm
except ImportError:
    sys.exit("This example needs timm: pip install timm")


def main() -> None:
    torch.manual_seed(0)
    # pretrained=True, and the model's own image size, in real use.
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=2)
    model.requires_grad_(False)
    for block in model.blocks:
        block.attn = fastprompt.nn.PromptAttention.from_fused_qkv(block.attn, length=8)
    model.head.requires_grad_(True)
    train(model)


if __name__ == "__main__":
    main()
