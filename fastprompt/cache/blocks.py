# SPDX-License-Identifier: Apache-2.0
"""Kept keys of heads that keep different numbers of them: in blocks, as many a head as it fills."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fastprompt.ops import prompt_attention
from fastprompt.ops.cpp.decode_blocks import MOST_ROWS
from fastprompt.ops.dispatch import backend, calls_cpp

#: Keys of a block on an accelerator.
BLOCK = 64

#: Keys of a block by the type of the device, where it is not `BLOCK`: a CPU goes from head to head, of any length.
SIZES = {"cpu": 1}

#: Numbers that the queries of one pass over the blocks may take.
PASS = 1 << 24


@dataclass(eq=False)
class Blocks:
    """Keys and values in blocks, those of a key head one after the other; nothing is padded.

    Blocks of one key are attended to head by head: a few calls, of little cost on a CPU. For larger ones attention runs
    over every block as if it were a sample of its own, so that a GPU is busy however few heads there are, and the
    results of a head's blocks are merged by their log-sum-exp. N blocks of L keys, D head size.

    Args:
        key: ``[N,L,D]``.
        value: ``[N,L,D]``.
        counts: Blocks of every key head of every sample.
    """

    key: Tensor
    value: Tensor
    counts: list[list[int]]

    def __post_init__(self):
        self._tables: tuple[Tensor, Tensor] | None = None
        self._ends: Tensor | None = None
        if self.key.shape[1] > 1:
            counts = torch.tensor(self.counts).flatten()
            # Whose block it is, and the blocks of every head: N where it has fewer than others.
            owner = torch.arange(len(counts)).repeat_interleave(counts)
            places = torch.arange(int(counts.max()))
            table = ((counts.cumsum(0) - counts)[:, None] + places).masked_fill(places >= counts[:, None], len(owner))
            self._tables = owner.to(self.key.device), table.to(self.key.device)

    def attend(
        self, query: Tensor, scale: float | None = None, key: Tensor | None = None, value: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(out [B,Hq,Tq,D], lse [B,Hq,Tq])`` of queries ``[B,Hq,Tq,D]`` that see every key of their head.

        And those of ``key [B,Hkv,T,D]``, if it is given, with ``value``.
        """
        if self._in_one_call(query):
            none = query.new_empty(*query.shape[:1], len(self.counts[0]), 0, query.shape[3])
            shared = (none, none) if key is None or value is None else (key, value)
            blocks = (self.key.flatten(0, 1), self.value.flatten(0, 1), self._last_keys())
            scale = query.shape[3] ** -0.5 if scale is None else scale
            return backend("decode_blocks", "cpp").forward(query, *shared, *blocks, scale)
        dim = query.shape[3]
        # The query heads of a key head are more rows of one head.
        rows = query.reshape(query.shape[0] * len(self.counts[0]), -1, dim).contiguous()
        out, lse = self._by_head(rows, scale) if self._tables is None else self._by_block(rows, *self._tables, scale)
        if key is not None and value is not None:
            more = self._kernel(rows)(rows.view(*key.shape[:2], -1, dim), key, value, scale=scale)
            # As `merge_states`, in fewer steps: a side that has keys for sure needs no guard.
            other, level = (x.reshape(y.shape).to(lse.dtype) for x, y in zip(more, (out, lse), strict=True))
            out = torch.lerp(out.to(lse.dtype), other, (level - lse).sigmoid().unsqueeze(-1)).to(query.dtype)
            lse = torch.logaddexp(lse, level)
        return out.view(query.shape), lse.view(query.shape[:3])

    def _in_one_call(self, query: Tensor) -> bool:
        """Whether the C++ kernel goes over the heads, which may have any number of keys."""
        rows = query.shape[1] // len(self.counts[0]) * query.shape[2]
        few = self._tables is None and rows <= MOST_ROWS
        return few and calls_cpp("prompt_attention", query, self.key, self.value)

    def _last_keys(self) -> Tensor:
        """Where the keys of every head end, from a 0 on."""
        if self._ends is None:
            counts = [n for of_sample in self.counts for n in of_sample]
            self._ends = torch.tensor(list(accumulate(counts, initial=0)))
        return self._ends

    def _kernel(self, rows: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        """On a CPU what the operation calls, too, without its checks, which would cost more than a short head does."""
        plain = rows.device.type == "cpu" and rows.dtype == self.key.dtype and not rows.requires_grad
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu if plain else _attend

    def _by_head(self, rows: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        kernel, found = self._kernel(rows), []
        ends = accumulate((n for of_sample in self.counts for n in of_sample), initial=0)
        for row, (start, end) in zip(rows[:, None, None], pairwise(ends), strict=True):
            key, value = (x[start:end].view(1, 1, -1, x.shape[-1]) for x in (self.key, self.value))
            found.append(kernel(row, key, value, scale=scale) if end > start else _none(row))
        out, lse = (torch.cat(x).squeeze(1) for x in zip(*found, strict=True))
        return out, lse.to(torch.promote_types(rows.dtype, torch.float32))

    def _by_block(self, rows: Tensor, owner: Tensor, table: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        found = []
        for part in rows.split(max(1, PASS // (len(owner) * rows.shape[2])), dim=1):
            heads = _attend(part[owner].unsqueeze(1), self.key.unsqueeze(1), self.value.unsqueeze(1), scale=scale)
            out, lse = (x.squeeze(1) for x in heads)
            lse = torch.nn.functional.pad(lse, (0, 0, 0, 1), value=-torch.inf)[table]
            total = lse.logsumexp(dim=1)
            # A head without blocks: 0 and -inf.
            weight = (lse - total.masked_fill(total == -torch.inf, 0.0).unsqueeze(1)).exp()
            out = (weight.unsqueeze(-1) * out[table.clamp(max=len(out) - 1)]).sum(dim=1)
            found.append((out.to(rows.dtype), total))
        out, lse = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
        return out, lse

    def select(self, samples: list[int]) -> Blocks:
        """Those of these samples, in this order."""
        ends = list(accumulate(map(sum, self.counts), initial=0))
        index = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in samples]).to(self.key.device)
        return Blocks(self.key[index], self.value[index], [self.counts[i] for i in samples])

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in (self.key, self.value, *(self._tables or ())))


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    nothing = key.new_empty(key.shape[1], 0, key.shape[-1])
    out, lse = prompt_attention(query, key, value, nothing, nothing, scale=scale, return_lse=True)
    return out, lse


def _none(query: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over no key."""
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    return torch.zeros_like(query), lse.to(query.device)


def split(key: Tensor, value: Tensor, index: Tensor) -> tuple[Blocks | None, Tensor, Tensor, Tensor]:
    """Take whole blocks out of what `compress` gave, where less memory is needed then; the rest has its form.

    Args:
        key: ``[B,Hkv,K,D]``.
        value: ``[B,Hkv,K,D]``.
        index: ``[B,Hkv,K]``, -1 behind the keys of a head that keeps fewer.

    Returns:
        ``(blocks, key, value, index)``: None and the arguments where nothing is to be gained.
    """
    size = SIZES.get(key.device.type, BLOCK)
    lengths = (index >= 0).sum(dim=-1)
    whole = lengths // size
    width = int((lengths % size).max())
    counts = whole.tolist()
    if size * sum(map(sum, counts)) + lengths.numel() * width >= index.numel():
        return None, key, value, index

    def blocks(x: Tensor) -> Tensor:
        heads = [x[b, h, : n * size] for b, of_sample in enumerate(counts) for h, n in enumerate(of_sample)]
        return torch.cat(heads).view(-1, size, x.shape[-1])

    rest = size * whole.unsqueeze(-1) + torch.arange(width, device=index.device)
    empty = rest >= lengths.unsqueeze(-1)
    rest = rest.clamp(max=index.shape[2] - 1)

    def others(x: Tensor) -> Tensor:
        return x.gather(2, rest.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))

    index = index.gather(2, rest).masked_fill(empty, -1)
    return Blocks(blocks(key), blocks(value), counts), others(key), others(value), index
