# SPDX-License-Identifier: Apache-2.0
"""Every random choice of a run: the order of the data, and torch's generators (saved, restored, seeded)."""

import numpy as np
import torch
from torch import Tensor, nn


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the order of ``n`` examples in one epoch; it depends on the arguments alone, so resuming needs no state.

    Example:
        >>> sorted(epoch_order(4, seed=0, epoch=7).tolist())
        [0, 1, 2, 3]
    """
    # torch's CPU generator uses 32 bits of its seed: SeedSequence mixes both numbers into them.
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


def cuda_devices(model: nn.Module) -> list[int]:
    """Return the indices of the CUDA devices that hold the model's parameters, in ascending order."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def seed_rng(seed: int, devices: list[int]) -> None:
    """Seed torch's CPU generator and those of the given CUDA devices, and no other."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def get_rng(devices: list[int]) -> dict[str, Tensor]:
    """Return the states of torch's CPU generator and of the given CUDA devices' generators, by name."""
    states = {"rng.cpu": torch.get_rng_state()}
    return states | {f"rng.cuda.{place}": torch.cuda.get_rng_state(device) for place, device in enumerate(devices)}


def set_rng(states: dict[str, Tensor], devices: list[int]) -> None:
    """Set the generators to the states that `get_rng` returned for as many devices."""
    torch.set_rng_state(states["rng.cpu"])
    for place, device in enumerate(devices):
        torch.cuda.set_rng_state(states[f"rng.cuda.{place}"], device)
