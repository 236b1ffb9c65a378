# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention_varlen` on CPU: sequences of one length are a batch, and so are the readers of a prompt.

Two attentions are merged by their log-sum-exp (identity I1): every row over its prompt, where all rows that read one
prompt stand in one matrix product, and every sequence over itself, where sequences of one length form a batch, so that
nothing is padded. The backward passes of both use the merged output and lse and need nothing else of each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastprompt.ops.cpu.prompt_attention import dense_rows

# Scores of one tile of the backward (elements).
TILE = 1 << 20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Batch(NamedTuple):
    """Segments of the packed rows that have one length: their numbers and their rows, one segment after the other."""

    members: Tensor
    length: int
    rows: slice | Tensor

    def take(self, x: Tensor) -> Tensor:
        """Packed ``[T,H,...]`` as ``[n,H,length,...]``; a view where the segments are neighbours."""
        x = x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)
        return x.unflatten(0, (len(self.members), self.length)).transpose(1, 2)

    def put(self, packed: Tensor, x: Tensor) -> None:
        """Write ``[n,H,length,...]`` to its rows of ``packed``."""
        packed[self.rows] = x.transpose(1, 2).flatten(0, 1).to(packed.dtype)


def _batches(lengths: Tensor, order: Tensor | None = None) -> list[Batch]:
    """The segments of ``lengths [S]`` by length; row i of the packed tensors is ``order[i]``, if given."""
    starts = lengths.cumsum(0) - lengths
    batches = []
    for length in lengths[lengths > 0].unique().tolist():
        members = torch.nonzero(lengths == length).flatten()
        start, count = int(starts[members[0]]), len(members)
        rows: slice | Tensor = slice(start, start + count * length)
        if int(members[-1] - members[0]) != count - 1:
            rows = (starts[members, None] + torch.arange(length)).flatten()
        batches.append(Batch(members, length, rows if order is None else order[rows]))
    return batches


def _readers(cu_seqlens: Tensor, prompt_index: Tensor | None, bank: int) -> list[Batch]:
    """The rows that read one prompt as a segment; prompts that nobody reads are left out."""
    lengths = cu_seqlens.diff()
    if prompt_index is None:
        return _batches(cu_seqlens[-1:] if bank == 1 else lengths)
    prompt_of_row = prompt_index.repeat_interleave(lengths)
    counts = torch.bincount(prompt_of_row, minlength=bank)
    sorted_already = bool((prompt_index.diff() >= 0).all())
    return _batches(counts, None if sorted_already else prompt_of_row.argsort(stable=True))


def _repeat(x: Tensor, groups: int) -> Tensor:
    """``[n,Hkv,M,D]`` for every query head."""
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


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
    wide = torch.promote_types(query.dtype, torch.float32)
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide)
    if not query.numel():
        return out, lse.fill_(-torch.inf)
    groups = query.shape[1] // key.shape[1]
    query, key, value = map(dense_rows, (query, key, value))
    for batch in _batches(cu_seqlens.diff()):
        keys, values = (_repeat(batch.take(x), groups) for x in (key, value))
        for packed, x in zip((out, lse), _attend(batch, query, keys, values, is_causal, scale), strict=True):
            batch.put(packed, x)
    if not prompt_key.shape[2]:
        return out, lse
    for batch in _readers(cu_seqlens, prompt_index, len(prompt_key)):
        keys, values = (_repeat(p[batch.members].to(query.dtype), groups) for p in (prompt_key, prompt_value))
        prompt_out, prompt_lse = _attend(batch, query, keys, values, False, scale)
        own_out, own_lse = batch.take(out), batch.take(lse)
        weight = torch.sigmoid(prompt_lse - own_lse).unsqueeze(-1)
        batch.put(out, torch.lerp(own_out, prompt_out, weight.to(out.dtype)))
        batch.put(lse, torch.logaddexp(own_lse, prompt_lse))
    return out, lse


def _attend(batch: Batch, query: Tensor, keys: Tensor, values: Tensor, is_causal: bool, scale: float):
    """Output and lse of the rows of ``batch`` over ``keys [n,Hq,M,D]``."""
    rows = batch.take(query)
    if not scale:
        # PyTorch's causal flash kernel would scale its -inf.
        rows, scale = torch.zeros_like(rows), 1.0
    return _flash(rows, keys, values, 0.0, is_causal, scale=scale)


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
    # Every row of dq, dk, dv is written; a prompt that nobody reads keeps its zeros.
    grads = [torch.empty_like(x) if need else None for x, need in zip(inputs[:3], needs, strict=False)]
    grads += [torch.zeros_like(x) if need else None for x, need in zip(inputs[3:], needs[3:], strict=True)]
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    query, key, value, grad_out = map(dense_rows, (query, key, value, grad_out))
    delta = (grad_out.to(wide) * out).sum(dim=-1)
    rows = _Rows(query, grad_out, out, lse, delta if grad_lse is None else delta - grad_lse, grad_lse is not None)
    dq = torch.empty_like(query, dtype=wide) if needs[0] else None
    if not query.numel():
        return [torch.zeros_like(x) for x, need in zip(inputs, needs, strict=True) if need]
    if any(needs[:3]):
        for batch in _batches(cu_seqlens.diff()):
            keys, values = (_repeat(batch.take(x), groups) for x in (key, value))
            found = rows.backward(batch, keys, values, is_causal, scale, needs[:3])
            for packed, x, heads in zip((dq, *grads[1:3]), found, (1, groups, groups), strict=True):
                if packed is not None:
                    batch.put(packed, _sum_groups(x, heads))
    if prompt_key.shape[2] and (needs[0] or any(needs[3:])):
        for batch in _readers(cu_seqlens, prompt_index, len(prompt_key)):
            # In float32, so that the gradient is rounded once.
            prompts = (p[batch.members].to(query.dtype).to(wide) for p in (prompt_key, prompt_value))
            keys, values = (_repeat(p, groups) for p in prompts)
            found = rows.backward(batch, keys, values, False, scale, [needs[0], *needs[3:]])
            if dq is not None:
                batch.put(dq, batch.take(dq) + found[0])
            for grad, x in zip(grads[3:], found[1:], strict=True):
                if grad is not None:
                    grad[batch.members] = _sum_groups(x, groups).to(grad.dtype)
    grads[0] = None if dq is None else dq.to(query.dtype)
    return [g for g in grads if g is not None]


def _sum_groups(x: Tensor, groups: int) -> Tensor:
    """Sum the query heads ``[n,Hq,...]`` that read one key head."""
    return x.unflatten(1, (-1, groups)).sum(2) if groups > 1 else x


class _Rows(NamedTuple):
    """What the backward over either set of keys reads of a row: all of it merged over both sets."""

    query: Tensor
    grad_out: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor
    through_lse: bool

    def backward(self, batch: Batch, keys: Tensor, values: Tensor, is_causal: bool, scale: float, needs: list[bool]):
        """dQ, dK, dV (None where not needed), each ``[n,Hq,...]``, of the rows of ``batch`` over its keys."""
        q, do = batch.take(self.query), batch.take(self.grad_out)
        if keys.dtype == q.dtype == self.lse.dtype and scale and not self.through_lse:
            out, lse = batch.take(self.out), batch.take(self.lse).contiguous()
            return _flash_backward(do, q, keys, values, out, lse, 0.0, is_causal, scale=scale)
        lse, delta = (batch.take(x).unsqueeze(-1) for x in (self.lse, self.delta))
        folded = [x.flatten(0, 1) for x in (q.to(keys.dtype), do.to(keys.dtype), lse, delta, keys, values)]
        found = _products(*folded, is_causal=is_causal, scale=scale, needs=needs)
        return [None if x is None else x.unflatten(0, q.shape[:2]) for x in found]


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
            p = torch.bmm(q[b, t].to(wide), k.to(wide).transpose(1, 2)).mul_(scale).sub_(lse[b, t])
            if is_causal:
                p.masked_fill_(torch.ones(p.shape[1:], dtype=torch.bool).triu_(start + 1), -torch.inf)
            p.exp_()
            last = t.stop == rows
            if dv is not None:
                _add(dv[b, seen], torch.bmm(p.to(do.dtype).transpose(1, 2), do[b, t]), last)
            if dq is None and dk is None:
                continue
            ds = torch.bmm(do[b, t], v.transpose(1, 2)).to(wide).sub_(delta[b, t]).mul_(p).to(q.dtype)
            if dq is not None:
                dq[b, t] = torch.bmm(ds, k).mul_(scale)
            if dk is not None:
                _add(dk[b, seen], torch.bmm(ds.transpose(1, 2), q[b, t]).mul_(scale), last)
    return dq, dk, dv


def _add(total: Tensor, part: Tensor, first: bool) -> None:
    """Write the first part of a sum, add the others."""
    total.copy_(part) if first else total.add_(part)
