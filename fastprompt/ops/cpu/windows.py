# SPDX-License-Identifier: Apache-2.0
"""Causal `prompt_attention_varlen` of short sequences on CPU: blocks of packed rows over windows of packed keys.

The classes of a text tower are ten rows over a handful of keys: less work than the calls that start it. So sequences
are not told apart by calls: a block of B neighbouring rows sees the B + L - 1 keys that end with it (L rows in the
longest sequence), those of other sequences hidden, and a prompt's keys in front; the windows of all blocks and heads
are one strided view and their products one call each. Tiles of whole sequences that read one prompt stay in the cache.

All is computed in float32 (float64 for float64 inputs), in which half-precision inputs are exact. A key that is not
finite spreads to rows of the same tile whose windows hold it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

#: Rows of a block: with short sequences a smaller one hides less.
BLOCKS = (16, 32)
#: Rows of a tile, about: what a tile reads and writes stays in the caches.
TILE = 768
#: Rows, at least, of one of several tiles on average; many prompts that few rows read are better off without windows.
LEAST = 128


class Tile(NamedTuple):
    """Rows of whole sequences that read one prompt."""

    rows: slice
    sequences: slice
    prompt: int


def tiles(cu_seqlens: Tensor, prompt_index: Tensor | None, bank: int) -> list[Tile]:
    """Neighbouring sequences of one prompt, about `TILE` rows at a time."""
    ends = cu_seqlens.tolist()
    count = len(ends) - 1
    index = [0] * count if bank == 1 else list(range(count)) if prompt_index is None else prompt_index.tolist()
    found, first = [], 0
    for s in range(1, count + 1):
        if s == count or index[s] != index[first] or ends[s + 1] - ends[first] > TILE:
            found.append(Tile(slice(ends[first], ends[s]), slice(first, s), index[first]))
            first = s
    return found


def short(longest: int, is_causal: bool) -> bool:
    """Whether windows can hold the sequences."""
    return is_causal and longest - 1 <= BLOCKS[-1]


def shared(tiled: list[Tile]) -> bool:
    """Whether enough rows read the prompt of a tile."""
    return len(tiled) == 1 or tiled[-1].rows.stop >= LEAST * len(tiled)


class _Windows:
    """The blocks and windows of one tile; ``heads`` are query heads."""

    def __init__(self, lengths: Tensor, longest: int, heads: int):
        self.block = next(b for b in BLOCKS if longest - 1 <= b)
        self.rows, self.behind, self.heads = int(lengths.sum()), longest - 1, heads
        self.blocks = -(-self.rows // self.block)
        self.total, self.window = self.blocks * self.block, self.block + self.behind
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        # Padding rows see each other, so that their softmax has something to divide by.
        owner = torch.nn.functional.pad(owner, (self.behind, self.total - self.rows), value=-1)
        mine = owner[self.behind :].view(self.blocks, self.block, 1)
        seen = owner.as_strided((self.blocks, 1, self.window), (self.block, 0, 1))
        after = torch.ones(self.block, self.window, dtype=torch.bool).triu_(self.behind + 1)
        self.hidden = (mine != seen) | after

    def blocked(self, x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Packed ``[T,H,D]`` as ``[H,total,D]``, zeros behind."""
        out = x.new_empty(self.heads, self.total, x.shape[-1], dtype=dtype)
        self._fill(out, x, scale)
        return out

    def windowed(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Packed ``[T,H,D]`` as windows ``[H*blocks,window,D]``, a view in which they overlap."""
        dim = x.shape[-1]
        flat = x.new_empty(self.behind + self.heads * self.total, dim, dtype=dtype)
        flat[: self.behind] = 0
        self._fill(flat[self.behind :].view(self.heads, self.total, dim), x, 1.0)
        # The first window of a head reaches back into the padding of the head before, which is hidden.
        return flat.as_strided((self.heads * self.blocks, self.window, dim), (self.block * dim, dim, 1))

    def _fill(self, out: Tensor, x: Tensor, scale: float) -> None:
        out[:, self.rows :] = 0
        rows = x.transpose(0, 1)
        if scale == 1.0:
            out[:, : self.rows].copy_(rows)
        else:
            torch.mul(rows.to(out.dtype), scale, out=out[:, : self.rows])

    def by_block(self, x: Tensor) -> Tensor:
        """``[H,total,X]`` or ``[H*total,X]`` as ``[H*blocks,block,X]``."""
        return x.reshape(self.heads * self.blocks, self.block, x.shape[-1])

    def by_head(self, x: Tensor) -> Tensor:
        """``[...,X]`` as ``[H,total,X]``."""
        return x.reshape(self.heads, self.total, x.shape[-1])

    def packed(self, x: Tensor, like: Tensor) -> Tensor:
        """``[H,total,...]`` as packed rows ``[T,H,...]``, in the dtype of ``like``."""
        return x[:, : self.rows].transpose(0, 1).to(like.dtype)

    def products(self, x: Tensor, windows: Tensor, prompt: Tensor) -> Tensor:
        """``x [H,total,D]`` times the keys of prompt ``[H,P,D]`` and windows: ``[H*total,P+window]``."""
        own = torch.bmm(self.by_block(x), windows.transpose(1, 2)).flatten(0, 1)
        return torch.cat([torch.bmm(x, prompt.transpose(1, 2)).flatten(0, 1), own], dim=1)

    def weights(self, query: Tensor, windows: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[H*total,P+window]``, -inf where hidden, and their softmax."""
        scores = self.products(query, windows, prompt)
        own = scores[:, prompt.shape[1] :].unflatten(0, (self.heads, self.blocks, self.block))
        own.masked_fill_(self.hidden, -torch.inf)
        return scores, torch.softmax(scores, dim=1)

    def mix(self, weights: Tensor, windows: Tensor, prompt: Tensor) -> Tensor:
        """``weights [H*total,P+window]`` times the values: ``[H,total,D]``."""
        shared, own = weights.split([prompt.shape[1], self.window], dim=1)
        out = self.by_head(torch.bmm(own.unflatten(0, (-1, self.block)), windows))
        return out.baddbmm_(shared.unflatten(0, (self.heads, -1)), prompt) if prompt.shape[1] else out

    def to_windows(self, weights: Tensor, x: Tensor) -> Tensor:
        """``weights^T x`` of own keys, summed over the windows that hold a key: ``[H,total,D]``."""
        own = weights[:, -self.window :].unflatten(0, (-1, self.block)).transpose(1, 2)
        parts = torch.bmm(own, self.by_block(x)).unflatten(0, (self.heads, self.blocks))
        out = parts[:, :, self.behind :].contiguous()
        out[:, :-1, self.block - self.behind :] += parts[:, 1:, : self.behind]
        return self.by_head(out)

    def to_prompt(self, weights: Tensor, x: Tensor) -> Tensor:
        """``weights^T x`` of the prompt's keys: ``[H,P,D]``."""
        shared = weights[:, : -self.window].unflatten(0, (self.heads, -1))
        return torch.bmm(shared.transpose(1, 2), x)


def _each(tiled: list[Tile], cu_seqlens: Tensor, longest: int, heads: int) -> Iterator[tuple[Tile, _Windows]]:
    lengths = cu_seqlens.diff().long()
    for tile in tiled:
        yield tile, _Windows(lengths[tile.sequences], longest, heads)


def _widened(x: Tensor, heads: int, dim: int) -> Tensor:
    """Key heads repeated for every query head that reads them."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim=dim)


def _narrowed(x: Tensor, heads: int, dim: int) -> Tensor:
    """The sum over the query heads that read a key head."""
    return x if x.shape[dim] == heads else x.unflatten(dim, (heads, -1)).sum(dim + 1)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    cu_seqlens: Tensor,
    tiled: list[Tile],
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[T,Hq,D]`` and lse ``[T,Hq]``."""
    heads, wide = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(query.shape[:2], dtype=wide)
    for tile, windows in _each(tiled, cu_seqlens, longest, heads):
        rows = tile.rows
        q = windows.blocked(query[rows], wide, scale)
        k, v = (windows.windowed(_widened(x[rows], heads, 1), wide) for x in (key, value))
        pk, pv = (_widened(p[tile.prompt], heads, 0).to(query.dtype).to(wide) for p in (prompt_key, prompt_value))
        scores, weights = windows.weights(q, k, pk)
        out[rows] = windows.packed(windows.mix(weights, v, pv), out)
        # The largest score has the largest weight: exp(score - lse).
        found = scores.amax(1) - weights.amax(1).log()
        lse[rows] = windows.packed(found.view(heads, -1), lse)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    cu_seqlens: Tensor,
    tiled: list[Tile],
    longest: int,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the inputs flagged in ``needs`` (query, key, value, prompt_key, prompt_value), in that order."""
    inputs = (query, key, value, prompt_key, prompt_value)
    heads, wide = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    dq, dk, dv = (torch.empty_like(x) if need else None for x, need in zip(inputs[:3], needs[:3], strict=True))
    # In float32 over all tiles, so that the gradient of a prompt is rounded once.
    dpk, dpv = (
        x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, wide)) if need else None
        for x, need in zip(inputs[3:], needs[3:], strict=True)
    )
    for tile, windows in _each(tiled, cu_seqlens, longest, heads):
        rows, prompt = tile.rows, tile.prompt
        q, do = windows.blocked(query[rows], wide, scale), windows.blocked(grad_out[rows], wide)
        k, v = (windows.windowed(_widened(x[rows], heads, 1), wide) for x in (key, value))
        pk, pv = (_widened(p[prompt], heads, 0).to(query.dtype).to(wide) for p in (prompt_key, prompt_value))
        _, weights = windows.weights(q, k, pk)
        if dv is not None:
            dv[rows] = _narrowed(windows.packed(windows.to_windows(weights, do), weights), dv.shape[1], 1).to(dv.dtype)
        if dpv is not None:
            dpv[prompt] += _narrowed(windows.to_prompt(weights, do), dpv.shape[1], 0)
        if dq is None and dk is None and dpk is None:
            continue
        ds = windows.products(do, v, pv)
        ds = torch._softmax_backward_data(ds, weights, 1, wide)
        if grad_lse is not None:
            ds.addcmul_(weights, windows.blocked(grad_lse[rows].unsqueeze(-1), wide).view(-1, 1))
        if dq is not None:
            dq[rows] = windows.packed(windows.mix(ds, k, pk).mul_(scale), dq)
        if dk is not None:
            dk[rows] = _narrowed(windows.packed(windows.to_windows(ds, q), ds), dk.shape[1], 1).to(dk.dtype)
        if dpk is not None:
            dpk[prompt] += _narrowed(windows.to_prompt(ds, q), dpk.shape[1], 0)
    sums = [torch.empty_like(x).copy_(s) for x, s in zip(inputs[3:], (dpk, dpv), strict=True) if s is not None]
    return [x for x in (dq, dk, dv) if x is not None] + sums
