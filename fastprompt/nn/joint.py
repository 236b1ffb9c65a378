# SPDX-License-Identifier: Apache-2.0
"""What the layers of a tower compute together at the start of a step, and read one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import nn

Member = TypeVar("Member", bound=nn.Module)
Share = TypeVar("Share")


class Joint(Generic[Member, Share]):
    """Computes what its members need of a training step in one go when the tower's forward begins; hands out shares.

    A prompt's own matrices have a few rows: a GPU waits for their launches longer than it computes, so that one batched
    product for all layers costs what one for a layer does. Whoever asks outside the tower's forward, or where
    `compute` found members that cannot be taken together, gets None and computes its own.

    Args:
        members: In layer order.
    """

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)
        self.taken: set[Member] = set()
        self._inside = False
        self._shares: dict[Member, Share] = {}

    def __getstate__(self) -> dict:
        # Shares belong to an autograd graph, which neither copies nor pickles.
        return {**vars(self), "taken": set(), "_inside": False, "_shares": {}}

    def compute(self) -> Sequence[Share] | None:
        """One share a member, or None where they cannot be taken together."""
        raise NotImplementedError

    def begin(self, *args) -> None:
        """A hook before the tower's forward: a graph serves one backward pass, so that a step starts a new one.

        What is shared is computed here and not by the first layer that asks, since a layer may be one that runs again
        in the backward pass, and what it reads of others must not be computed inside it.
        """
        if torch.compiler.is_compiling():  # a compiler merges what it sees
            return
        self._shares, self.taken, self._inside = {}, set(), True
        found = self.compute() if len(self.members) > 1 and torch.is_grad_enabled() else None
        if found is not None:
            self._shares = dict(zip(self.members, found, strict=True))

    def end(self, *args) -> None:
        """A hook behind the tower's forward: from here on, only layers that the backward pass runs again are served."""
        if not torch.compiler.is_compiling():
            self._inside = False

    def share(self, member: Member) -> Share | None:
        """What a member is to read, None where it is to compute its own."""
        # Without gradients this may be a layer that runs again with them: it must not count as one that has read.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or member not in self._shares:
            return None
        # A layer that runs again must read what it read, or it saves other tensors than the first time.
        again = member in self.taken and torch._C._current_graph_task_id() != -1
        if not (self._inside or again):
            return None
        self.taken.add(member)
        return self._shares[member]
