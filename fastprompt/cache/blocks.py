# SPDX-License-Identifier: Apache-2.0
"""Kept keys of heads that keep different numbers of them: whole blocks, as many a head as it fills."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastprompt.ops import prompt_attention

#: Keys of a block.
BLOCK = 64

#: Numbers that the queries of one pass over the blocks may take.
PASS = 1 << 24


@dataclass(eq=False)
class Blocks:
    """Keys and values in blocks, those of a key head one after the other; nothing is padded.

    Attention runs over every block as if it were a sample of its own, with the kernels that a device has, and the
    results of a head's blocks are merged by their log-sum-exp. N blocks, D head size.

    Args:
        key: ``[N,BLOCK,D]``.
        value: ``[N,BLOCK,D]``.
        counts: Blocks of every key head of every sample.
    """

    key: Tensor
    value: Tensor
    counts: list[list[int]]

    def __post_init__(self):
        counts = torch.tensor(self.counts).flatten()
        # Whose block it is, and the blocks of every head: N where it has fewer than others.
        owner = torch.arange(len(counts)).repeat_interleave(counts)
        places = torch.arange(int(counts.max()))
        table = (counts.cumsum(0) - counts)[:, None] + places
        table = table.masked_fill(places >= counts[:, None], len(owner))
        self.owner, self.table = owner.to(self.key.device), table.to(self.key.device)

    def attend(self, query: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """``(out [B,Hq,Tq,D], lse [B,Hq,Tq])`` of queries ``[B,Hq,Tq,D]`` that see every key of their head."""
        batch, heads, _, dim = query.shape
        step = max(1, PASS * batch // (len(self.key) * heads * dim))
        parts = [self._attend(part, scale) for part in query.split(step, dim=2)]
        if len(parts) == 1:
            return parts[0]
        out, lse = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
        return out, lse

    def _attend(self, query: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        heads_kv = len(self.counts[0])
        # The query heads of a key head are more rows of one head.
        rows = query.unflatten(1, (heads_kv, -1)).flatten(2, 3).flatten(0, 1)
        nothing = self.key.new_empty(1, 0, query.shape[-1])
        found = prompt_attention(
            rows[self.owner].unsqueeze(1), self.key.unsqueeze(1), self.value.unsqueeze(1), nothing, nothing,
            scale=scale, return_lse=True,
        )  # fmt: skip
        out, lse = (x.squeeze(1) for x in found)
        lse = torch.nn.functional.pad(lse, (0, 0, 0, 1), value=-torch.inf)[self.table]
        total = lse.logsumexp(dim=1)
        # A head without blocks: 0 and -inf.
        weight = (lse - total.masked_fill(total == -torch.inf, 0.0).unsqueeze(1)).exp()
        out = (weight.unsqueeze(-1) * out[self.table.clamp(max=len(out) - 1)]).sum(dim=1)
        return out.to(query.dtype).view(query.shape), total.view(query.shape[:3])

    def select(self, samples: list[int]) -> Blocks:
        """Those of these samples, in this order."""
        ends = [0, *accumulate(map(sum, self.counts))]
        index = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in samples]).to(self.key.device)
        return Blocks(self.key[index], self.value[index], [self.counts[i] for i in samples])

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in (self.key, self.value, self.owner, self.table))


def split(key: Tensor, value: Tensor, index: Tensor) -> tuple[Blocks | None, Tensor, Tensor, Tensor]:
    """Take whole blocks out of what `compress` gave, where less memory is needed then; the rest has its form.

    Args:
        key: ``[B,Hkv,K,D]``.
        value: ``[B,Hkv,K,D]``.
        index: ``[B,Hkv,K]``, -1 behind the keys of a head that keeps fewer.

    Returns:
        ``(blocks, key, value, index)``: None and the arguments where nothing is to be gained.
    """
    lengths = (index >= 0).sum(dim=-1)
    whole = lengths // BLOCK
    width = int((lengths % BLOCK).max())
    counts = whole.tolist()
    if BLOCK * sum(map(sum, counts)) + lengths.numel() * width >= index.numel():
        return None, key, value, index

    def blocks(x: Tensor) -> Tensor:
        heads = [x[b, h, : n * BLOCK] for b, of_sample in enumerate(counts) for h, n in enumerate(of_sample)]
        return torch.cat(heads).view(-1, BLOCK, x.shape[-1])

    rest = BLOCK * whole.unsqueeze(-1) + torch.arange(width, device=index.device)
    empty = rest >= lengths.unsqueeze(-1)
    rest = rest.clamp(max=index.shape[2] - 1)

    def others(x: Tensor) -> Tensor:
        return x.gather(2, rest.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))

    index = index.gather(2, rest).masked_fill(empty, -1)
    return Blocks(blocks(key), blocks(value), counts), others(key), others(value), index
