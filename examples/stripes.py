# SPDX-License-Identifier: Apache-2.0
"""A synthetic image task, and the few lines that train prompts on it."""

import torch
from torch import nn


def stripes(count: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images ``[count,3,size,size]`` of stripes, and whether they rise (1) or fall (0)."""
    labels = torch.randint(0, 2, (count,))
    phase, across = 6.3 * torch.rand(count, 1, 1), torch.arange(size)
    slope = (2 * labels - 1).view(-1, 1, 1)
    waves = torch.sin(0.8 * (across.view(1, 1, -1) + slope * across.view(1, -1, 1)) + phase)
    return waves.unsqueeze(1).expand(-1, 3, -1, -1) + 0.3 * torch.randn(count, 3, size, size), labels


def train(model: nn.Module, steps: int = 60, learning_rate: float = 0.01) -> float:
    """Train what requires a gradient; return the accuracy on images that were not trained on."""
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"training {sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        images, labels = stripes(32)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    images, labels = stripes(256)
    with torch.no_grad():
        accuracy = (model(images).argmax(dim=-1) == labels).float().mean().item()
    print(f"accuracy on new images {accuracy:.2f}")
    return accuracy
