# SPDX-License-Identifier: Apache-2.0
"""What a compression policy sees of one layer: keys, values, and what was kept of the queries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastprompt.ops import key_scores


@dataclass(eq=False)
class Observed:
    """One layer's cache at the end of a prompt, as a policy sees it.

    B batch, Hkv key heads, Hq query heads, T keys, W rows of queries, D head size. Keys are as the cache holds them,
    rotated where the model rotates.

    Args:
        key: ``[B,Hkv,T,D]``.
        value: ``[B,Hkv,T,D]``.
        valid: bool ``[B,T]``, False at padding; None where nothing is padded.
        text: bool ``[B,T]``, False at tokens that stand for image patches; None where nobody looked.
        sums: Column sums of the softmax over the prompt's queries, ``[B,Hkv,T]``, the mean over the query heads
            of a key head; for policies with ``rows = None``.
        query: The last rows of queries, ``[B,Hq,W,D]``, aligned with the last W keys; for policies with ``rows > 0``.
        lse: Their log-sum-exp, ``[B,Hq,W]``.
        scale: The softmax scale of those.
        layer: The layer's number.

    Example:
        >>> import torch
        >>> from fastprompt.cache import Observed
        >>> key = value = torch.randn(2, 4, 7, 16)
        >>> Observed(key, value, valid=torch.arange(7) >= torch.tensor([[0], [3]])).lengths
        [7, 4]
    """

    key: Tensor
    value: Tensor
    valid: Tensor | None = None
    text: Tensor | None = None
    sums: Tensor | None = None
    query: Tensor | None = None
    lse: Tensor | None = None
    scale: float | None = None
    layer: int = 0

    @cached_property
    def mask(self) -> Tensor:
        """Bool ``[B,T]``: True at keys that are no padding."""
        batch, _, length, _ = self.key.shape
        return self.key.new_ones(batch, length, dtype=torch.bool) if self.valid is None else self.valid

    @cached_property
    def lengths(self) -> list[int]:
        """The number of keys of every sample, without padding."""
        if self.valid is None:
            return [self.key.shape[2]] * self.key.shape[0]
        return self.valid.sum(dim=-1).tolist()

    @cached_property
    def place(self) -> Tensor:
        """int64 ``[B,T]``: a key's place among those of its sample, from 0, whatever is padded where."""
        return self.mask.cumsum(dim=-1) - 1

    def last(self, counts: int | list[int]) -> Tensor:
        """Bool ``[B,T]``: True at the last ``counts`` keys of every sample."""
        counts = [counts] * len(self.lengths) if isinstance(counts, int) else counts
        start = [n - count for n, count in zip(self.lengths, counts, strict=True)]
        return self.mask & (self.place >= torch.tensor(start, device=self.key.device)[:, None])

    def column_sums(self) -> Tensor:
        """``[B,Hkv,T]``: ``sum_i softmax(s q_i K^T)_j`` over all queries of the prompt.

        Raises:
            ValueError: nobody looked at the queries.
        """
        if self.sums is None:
            raise ValueError("sums: got None; this policy ranks keys by the attention of all queries, which a cache "
                             "adds up while the prompt runs; pass sums=key_scores(...)")  # fmt: skip
        return self.sums

    def attention_of_last(self, rows: int) -> Tensor:
        """``[B,Hkv,T]``: the mean attention that a sample's last ``rows`` queries give to every key.

        Raises:
            ValueError: nobody kept those queries.
        """
        if self.query is None or self.lse is None:
            raise ValueError("query: got None; this policy ranks keys by the attention of the last queries, which a "
                             "cache keeps while the prompt runs; pass query=, lse= and scale=")  # fmt: skip
        width = self.query.shape[2]
        counted = self.last(rows)[:, -width:]
        sums = key_scores(
            self.query, self.key, self.lse, query_mask=counted, key_mask=self.valid, scale=self.scale
        )  # fmt: skip
        return sums / counted.sum(dim=-1).clamp(min=1)[:, None, None]
