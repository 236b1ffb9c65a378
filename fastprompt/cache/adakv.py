# SPDX-License-Identifier: Apache-2.0
"""`AdaKV`: the heads of a layer share its budget by their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprompt.cache.observed import Observed
from fastprompt.cache.policy import Around, suffices
from fastprompt.cache.ranks import ranks


@dataclass(frozen=True)
class AdaKV(Around):
    """Ada-KV (Feng et al., 2024, https://arxiv.org/abs/2407.11550): heads that spread their attention keep more keys.

    A layer's budget is ``Hkv k`` keys, k those that the policy inside gives to every head. Every head keeps what the
    policy protects and no less than its ``int(floor k)`` first keys in the policy's order; the rest goes to the highest
    scores that are left in any head, ties to the lower head, then position. That is the method as kvpress has it, which
    the paper's first author reviewed; the released code counts a head's share of the best keys and adds the floor.

    Args:
        policy: What ranks keys, by the attention that they get: `SnapKV`, `H2O`, or `LookM` without
            ``overflow="cap"``, which turns sums into ranks.
        floor: Share of ``k`` that every head keeps, whatever its scores are.

    Example:
        >>> import fastprompt
        >>> fastprompt.AdaKV(fastprompt.SnapKV(keep=1024))
        AdaKV(policy=SnapKV(keep=1024, window=64, kernel=5), floor=0.2)
    """

    floor: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)):
            raise TypeError(f"floor: got {self.floor!r}, expected a share of a head's budget (a float)")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor: got {self.floor!r}, expected a share of a head's budget in [0, 1]")
        if self.policy.interval is not None or self.policy.per_head:
            raise ValueError(
                f"policy: got {self.policy!r}, expected a policy without {type(self.policy).__name__}: budgets are "
                "shared out once, when the prompt is over"
            )
        if not self.policy.comparable:
            raise ValueError(
                f"policy: scores of {self.policy!r} do not compare between heads, or are the same for all of them; use "
                "one that ranks keys by the attention that a head gives them: SnapKV, H2O, or LookM without "
                "overflow='cap'"
            )

    @property
    def per_head(self) -> bool:
        """Yes."""
        return True

    def budget(self, seen: Observed) -> list[int] | Tensor:
        """int64 ``[B,Hkv]`` with the sum of the policy's own; its own where nothing needs to go."""
        budget = self.policy.budget(seen)
        if isinstance(budget, Tensor):
            raise ValueError(f"policy: {self.policy!r} gave heads budgets of their own, expected one number a sample")
        if suffices(budget, seen):
            return budget
        each = [min(b, n) for b, n in zip(budget, seen.lengths, strict=True)]
        score, protected = self.policy.score(seen), self.policy.protect(seen)
        first = torch.zeros_like(seen.mask) if protected is None else protected & seen.mask

        def column(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, device=score.device)[:, None]

        # Of three tiers: what stays, what competes, what is padding.
        tier = torch.ones_like(first, dtype=torch.uint8).masked_fill(first, 0).masked_fill(~seen.mask, 2)
        tier = tier[:, None].expand_as(score)
        safe = torch.minimum(column(each), first.sum(dim=-1, keepdim=True))
        safe = torch.maximum(safe, column([int(self.floor * k) for k in each]))
        tier = tier.clamp(min=1).masked_fill(ranks(score, tier) < safe[:, None], 0)
        stays = ranks(score.flatten(1), tier.flatten(1)) < score.shape[1] * column(each)
        return stays.view(score.shape).sum(dim=-1)
