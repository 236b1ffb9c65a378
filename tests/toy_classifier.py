# SPDX-License-Identifier: Apache-2.0
"""A tiny classifier with a frozen backbone and a trainable prompt and head, and data that it can learn."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastprompt.tuning import TuneConfig, TuneResult

CLASSES, FEATURES = 3, 8


class Toy(nn.Module):
    """A frozen projection, a prompt added to the input and a linear head; draws dropout from torch's generator."""

    def __init__(self, noise: float = 0.2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.backbone = nn.Parameter(torch.randn(FEATURES, FEATURES, generator=generator))
        self.prompt = nn.Parameter(torch.zeros(FEATURES))
        self.head = nn.Linear(FEATURES, CLASSES)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.noise = noise

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SimpleNamespace:
        hidden = torch.tanh((pixel_values + self.prompt) @ self.backbone / 3)
        # Dropout even in eval mode: random numbers are drawn in training and in evaluation alike.
        logits = self.head(nn.functional.dropout(hidden, self.noise, training=True))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@dataclass
class ToyHandle:
    """Stands in for the handle of attached prompts."""

    model: Toy

    def parameters(self) -> list[Tensor]:
        return [self.model.prompt, *self.model.head.parameters()]

    def save(self, folder) -> None:
        (folder / "saved").write_text("yes")


class Blobs:
    """Three separable clouds; ``before`` is called with the number of examples read so far."""

    def __init__(self, n: int = 14, seed: int = 0, before=lambda read: None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % CLASSES
        self.pixels = 0.3 * torch.randn(n, FEATURES, generator=generator)
        self.pixels[torch.arange(n), self.labels] += 2
        self.before, self.read = before, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.before(self.read)
        self.read += 1
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


# 14 examples in batches of 4: four steps an epoch, the last with two examples; twelve steps in all.
CONFIG = TuneConfig(epochs=3, batch_size=4, lr=0.05, weight_decay=0.01, warmup=0.25, eval_every=1)


def timeless(result: TuneResult) -> TuneResult:
    return replace(result, seconds_per_step=0.0)
