# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention_varlen` on CPU: sequences of one length are a batch, and so are the rows that read one prompt.

Two attentions are merged by their log-sum-exp (identity I1): every sequence over itself, where sequences of one length
form a batch, so that nothing is padded; and every row over its prompt, where all rows that read one prompt stand in one
product. The backward passes of both read the merged output and lse and need nothing else of each other. Short causal
sequences, such as the classes of a text tower, take `windows` instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt.ops.checks import without_autocast
from fastprompt.ops.cpu import windows
from fastprompt.ops.layouts import dense_rows

# Scores of one tile of the backward (elements).
TILE = 1 << 20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Batch(NamedTuple):
    """Neighbouring segments of one length: their labels and their rows."""

    labels: Tensor
    length: int
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """The rows of ``x [T,H,...]`` as a view ``[n,H,length,...]``."""
        return x[self.rows].unflatten(0, (len(self.labels), self.length)).transpose(1, 2)


class Segments(NamedTuple):
    """The packed rows, put in order so that rows of one label, and labels of as many rows, are neighbours."""

    order: Tensor | None
    back: Tensor | None
    batches: list[Batch]

    def sort(self, *packed: Tensor) -> list[Tensor]:
        """Packed ``[T,...]`` in the order of the batches."""
        return [x if self.order is None else x.index_select(0, self.order) for x in packed]

    def unsort(self, x: Tensor) -> Tensor:
        """The inverse of `sort`."""
        return x if self.back is None else x.index_select(0, self.back)


def _segments(cu_seqlens: Tensor, label: Tensor, labels: int) -> Segments:
    """Sequences ``[S]`` in batches by their ``label`` in ``[0, labels)``; a label without rows is left out."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    rows = torch.zeros(labels, dtype=torch.int64).index_add_(0, label, lengths)
    by_label = label.argsort(stable=True)
    sequences = by_label[rows[label[by_label]].argsort(stable=True)]
    order = back = None
    if bool((sequences.diff() < 0).any()):
        lengths = lengths[sequences]
        shift = starts[sequences] - (lengths.cumsum(0) - lengths)
        order = shift.repeat_interleave(lengths) + torch.arange(int(cu_seqlens[-1]))
        back = order.argsort()
    found = rows.argsort(stable=True)
    found = found[rows[found] > 0]
    batches, first, start = [], 0, 0
    for length, count in zip(*(x.tolist() for x in rows[found].unique_consecutive(return_counts=True)), strict=True):
        batches.append(Batch(found[first : first + count], length, slice(start, start + count * length)))
        first, start = first + count, start + count * length
    return Segments(order, back, batches)


def _sequences(cu_seqlens: Tensor) -> Segments:
    """Every sequence is a segment."""
    return _segments(cu_seqlens, torch.arange(len(cu_seqlens) - 1), len(cu_seqlens) - 1)


def _readers(cu_seqlens: Tensor, prompt_index: Tensor | None, bank: int) -> Segments:
    """The rows that read one prompt are a segment."""
    if prompt_index is None:
        prompt_index = torch.arange(len(cu_seqlens) - 1) if bank > 1 else torch.zeros(len(cu_seqlens) - 1).long()
    return _segments(cu_seqlens, prompt_index, bank)


def _short(
    cu_seqlens: Tensor, prompt_index: Tensor | None, bank: int, is_causal: bool
) -> tuple[list[windows.Tile], int]:
    """The tiles where `windows` is the faster way, else none; and the rows of the longest sequence."""
    longest = int(cu_seqlens.diff().max())
    if not windows.short(longest, is_causal):
        return [], longest
    tiled = windows.tiles(cu_seqlens, prompt_index, bank)
    return tiled if windows.shared(tiled) else [], longest


def _per_query_head(x: Tensor, groups: int) -> Tensor:
    """``[n,Hkv,M,D]`` for every query head."""
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def _per_key_head(x: Tensor, groups: int) -> Tensor:
    """The sum over the query heads ``[n,Hq,M,D]`` that read one key head."""
    return x.unflatten(1, (-1, groups)).sum(2) if groups > 1 else x


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    cu_seqlens: Tensor,
    prompt_index: Tensor | None,
    max_seqlen: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[T,Hq,D]`` and lse ``[T,Hq]``."""
    if not query.numel():
        wide = torch.promote_types(query.dtype, torch.float32)
        return query.new_zeros(query.shape), torch.full(query.shape[:2], -torch.inf, dtype=wide)
    tiled, longest = _short(cu_seqlens, prompt_index, len(prompt_key), is_causal)
    if tiled:
        with without_autocast("cpu"):
            return windows.forward(query, key, value, prompt_key, prompt_value, cu_seqlens, tiled, longest, scale)
    groups = query.shape[1] // key.shape[1]
    query, key, value = map(dense_rows, (query, key, value))
    segments = _sequences(cu_seqlens)
    rows, *own = segments.sort(query, key, value)
    keys = [[_per_query_head(batch.of(x), groups) for x in own] for batch in segments.batches]
    out, lse = _attend(segments, rows, keys, is_causal, scale)
    if not prompt_key.shape[2]:
        return out, lse
    segments = _readers(cu_seqlens, prompt_index, len(prompt_key))
    prompts = [p.to(query.dtype) for p in (prompt_key, prompt_value)]
    keys = [[_per_query_head(p[batch.labels], groups) for p in prompts] for batch in segments.batches]
    prompt_out, prompt_lse = _attend(segments, segments.sort(query)[0], keys, False, scale)
    weight = torch.sigmoid(prompt_lse - lse).unsqueeze(-1)
    return torch.lerp(out, prompt_out, weight.to(out.dtype)), torch.logaddexp(lse, prompt_lse)


def _attend(
    segments: Segments, query: Tensor, keys: list[list[Tensor]], is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Packed output and lse of sorted query rows over the keys and values ``[n,Hq,M,D]`` of each batch."""
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    if not scale:
        # PyTorch's causal flash kernel would scale its -inf.
        query, scale = torch.zeros_like(query), 1.0
    for batch, pair in zip(segments.batches, keys, strict=True):
        batch_out, batch_lse = _flash(batch.of(query), *pair, 0.0, is_causal, scale=scale)
        batch.of(out).copy_(batch_out)
        batch.of(lse).copy_(batch_lse)
    return segments.unsort(out), segments.unsort(lse)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    cu_seqlens: Tensor,
    prompt_index: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the inputs flagged in ``needs`` (query, key, value, prompt_key, prompt_value), in that order."""
    inputs = (query, key, value, prompt_key, prompt_value)
    if not query.numel():
        return [torch.zeros_like(x) for x, need in zip(inputs, needs, strict=True) if need]
    tiled, longest = _short(cu_seqlens, prompt_index, len(prompt_key), is_causal)
    if tiled and any(needs[:3]):
        with without_autocast("cpu"):
            return windows.backward(grad_out, grad_lse, *inputs, cu_seqlens, tiled, longest, scale, needs)
    # A prompt that nobody reads keeps its zeros.
    grads = [torch.zeros_like(x) if need else None for x, need in zip(inputs[3:], needs[3:], strict=True)]
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    query, key, value, grad_out = map(dense_rows, (query, key, value, grad_out))
    # The flash backward is the faster in float32; it takes no gradient of lse, and rounds sums in half precision.
    flash = query.dtype == wide and grad_lse is None and scale != 0
    delta = out
    if not flash:
        delta = (grad_out.to(wide) * out).sum(dim=-1)
        delta = delta if grad_lse is None else delta - grad_lse
    merged = (query, grad_out, lse, delta)
    dq = dk = dv = None
    if any(needs[:3]):
        segments = _sequences(cu_seqlens)
        *rows, keys, values = segments.sort(*merged, key, value)
        totals = [
            torch.empty(x.shape, dtype=wide) if need else None for x, need in zip(inputs, needs[:3], strict=False)
        ]
        for batch in segments.batches:
            pair = [_per_query_head(batch.of(x), groups) for x in (keys, values)]
            found = _backward(batch, rows, pair, is_causal, scale, needs[:3], flash)
            for total, x, shared in zip(totals, found, (1, groups, groups), strict=True):
                if total is not None:
                    batch.of(total).copy_(_per_key_head(x, shared))
        dq, dk, dv = (None if x is None else segments.unsort(x) for x in totals)
    if prompt_key.shape[2] and (needs[0] or any(needs[3:])):
        segments = _readers(cu_seqlens, prompt_index, len(prompt_key))
        rows = segments.sort(*merged)
        total = torch.empty(query.shape, dtype=wide) if needs[0] else None
        # In float32, so that the gradient of a prompt is rounded once.
        prompts = [p.to(query.dtype).to(wide) for p in (prompt_key, prompt_value)]
        for batch in segments.batches:
            pair = [_per_query_head(p[batch.labels], groups) for p in prompts]
            found = _backward(batch, rows, pair, False, scale, [needs[0], *needs[3:]], flash)
            if total is not None:
                batch.of(total).copy_(found[0])
            for grad, x in zip(grads, found[1:], strict=True):
                if grad is not None:
                    grad[batch.labels] = _per_key_head(x, groups).to(grad.dtype)
        if dq is not None and total is not None:
            dq += segments.unsort(total)
    found = [_like(x, grad) for x, grad in zip(inputs, (dq, dk, dv), strict=False) if grad is not None]
    return found + [grad for grad in grads if grad is not None]


def _like(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the dtype and the strides that the fake implementation promises: those of ``empty_like(x)``."""
    promised = torch.empty_like(x)
    return grad.to(x.dtype) if grad.stride() == promised.stride() else promised.copy_(grad)


def _backward(
    batch: Batch,
    rows: list[Tensor],
    pair: list[Tensor],
    is_causal: bool,
    scale: float,
    needs: list[bool],
    flash: bool,
) -> list[Any]:
    """dQ, dK, dV (None where not needed) of sorted rows over the keys and values ``[n,Hq,M,D]`` of their batch.

    ``rows``: query, grad_out, the merged lse, and delta, or for flash, which computes delta, the merged output.
    """
    query, grad_out, lse, delta = map(batch.of, rows)
    if flash:
        return _flash_backward(grad_out, query, *pair, delta, lse.contiguous(), 0.0, is_causal, scale=scale)
    dtype = pair[0].dtype
    folded = [x.flatten(0, 1) for x in (query.to(dtype), grad_out.to(dtype), lse, delta, *pair)]
    found = _products(*folded, is_causal=is_causal, scale=scale, needs=needs)
    return [None if x is None else x.unflatten(0, query.shape[:2]) for x in found]


def _products(q, do, lse, delta, keys, values, *, is_causal: bool, scale: float, needs: list[bool]):
    """The gradients as batched matrix products, a tile of scores at a time: ``P = exp(scale q k - lse)`` in float32."""
    (batch, rows, _), columns = q.shape, keys.shape[1]
    wide = lse.dtype
    dq = torch.empty_like(q, dtype=wide) if needs[0] else None
    dk, dv = (torch.empty_like(keys, dtype=wide) if need else None for need in needs[1:])
    count = max(1, TILE // (rows * columns))
    block = min(rows, max(1, TILE // columns))
    for first in range(0, batch, count):
        b = slice(first, first + count)
        # The last block first: it is the one that sees all columns and writes what the others add to.
        for start in reversed(range(0, rows, block)):
            t = slice(start, min(start + block, rows))
            seen = slice(0, t.stop if is_causal else columns)
            k, v = keys[b, seen], values[b, seen]
            p = torch.bmm(q[b, t].to(wide), k.to(wide).transpose(1, 2)).mul_(scale).sub_(lse[b, t].unsqueeze(-1))
            if is_causal:
                p.masked_fill_(torch.ones(p.shape[1:], dtype=torch.bool).triu_(start + 1), -torch.inf)
            p.exp_()
            last = t.stop == rows
            if dv is not None:
                _add(dv[b, seen], torch.bmm(p.to(do.dtype).transpose(1, 2), do[b, t]), last)
            if dq is None and dk is None:
                continue
            dp = torch.bmm(do[b, t], v.transpose(1, 2)).to(wide)
            ds = dp.sub_(delta[b, t].unsqueeze(-1)).mul_(p).to(q.dtype)
            if dq is not None:
                dq[b, t] = torch.bmm(ds, k).mul_(scale)
            if dk is not None:
                _add(dk[b, seen], torch.bmm(ds.transpose(1, 2), q[b, t]).mul_(scale), last)
    return dq, dk, dv


def _add(total: Tensor, part: Tensor, first: bool) -> None:
    """Write the first part of a sum, add the others."""
    total.copy_(part) if first else total.add_(part)
