# SPDX-License-Identifier: Apache-2.0
"""The order in which keys stay."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(score: Tensor, tier: Tensor) -> Tensor:
    """Places from 0 (int64, shaped as ``score``) by tier, the lowest first, then score, the highest first, then index.

    Nothing is added to a score to move it into another tier: in float32 a large constant would wipe out the order of
    the others.
    """
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, tier.gather(-1, order).argsort(dim=-1, stable=True))
    places = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
