# SPDX-License-Identifier: Apache-2.0
"""`decoupled_attention` on CPU: one branch after the other, by a backend of prompt attention, PyTorch's or C++.

Keys that a batch shares are read with batch stride 0. In the backward the samples become rows of one long sample whose
prompt those keys are, so that their gradient is summed in float32 and rounded once. A mask or causality tells samples
and rows apart: there they stay samples, and their float32 gradients are added.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def forward(
    attention: ModuleType,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor | None],
    factors: list[float],
    attn_masks: list[Tensor | None],
    is_causal: list[bool],
    scale: float,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Output ``[B,Hq,Tq,D]`` (memory order B,T,H,D); to ``keep`` for the backward, the lse ``[B,Hq,Tq]`` of every
    branch, then their outputs. ``attention``: a backend module of `prompt_attention`.
    """
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    total: Tensor | None = None
    for j, (key, value, weight) in enumerate(zip(keys, values, weights, strict=True)):
        if weight is None and not factors[j]:
            key, value = key[:, :, :0], value[:, :, :0]
        mask = None if attn_masks[j] is None or not key.shape[2] else attn_masks[j]
        key, value = (x.expand(len(query), -1, -1, -1) for x in (key, value))
        none = query.new_empty(1, key.shape[1], 0, query.shape[3])
        out, lse = attention.forward(query, key, value, none, none, None, mask, is_causal[j], scale)
        if keep:
            outs.append(out)
            lses.append(lse)
        total = _add(total, out, weight, factors[j], fresh=not keep)
    if total is None:
        raise RuntimeError("keys: no branch")
    # Nothing that is kept is what is returned.
    return (total.clone() if keep and total is outs[0] else total), [*lses, *outs]


def _add(total: Tensor | None, out: Tensor, weight: Tensor | None, factor: float, fresh: bool) -> Tensor:
    """``total + w out``; where nobody keeps ``out``, in memory that is there."""
    if total is None:
        if weight is None and factor == 1:
            return out
        return out.mul_(factor) if fresh and weight is None else _weighted(out, weight, factor)
    if weight is not None:
        out, factor = _weighted(out, weight, factor), 1.0
    return total.add_(out, alpha=factor) if fresh else torch.add(total, out, alpha=factor)


def _weighted(x: Tensor, weight: Tensor | None, factor: float) -> Tensor:
    """``w x``, in the dtype of ``x``."""
    if weight is None:
        return x * factor
    return (x * weight.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1)).to(x.dtype)


def backward(
    attention: ModuleType,
    grad_out: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor | None],
    factors: list[float],
    attn_masks: list[Tensor | None],
    is_causal: list[bool],
    scale: float,
    states: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of those of query, keys, values and weight tensors that ``needs`` names, in their order."""
    n = len(keys)
    wide = torch.promote_types(query.dtype, torch.float32)
    need_weight = iter(needs[1 + 2 * n :])
    dq: Tensor | None = None
    dks, dvs, dws = [], [], []
    for j, (key, value, weight, lse, out) in enumerate(zip(keys, values, weights, states[:n], states[n:], strict=True)):
        if weight is not None and next(need_weight):
            full = (grad_out.to(wide) * out).sum(-1)
            dws.append(torch.empty_like(weight).copy_(full.sum_to_size(weight.shape)))
        wanted = [needs[0], needs[1 + j], needs[1 + n + j]]
        if not any(wanted):
            continue
        if weight is None and not factors[j]:
            dks += [torch.zeros_like(key)] if wanted[1] else []
            dvs += [torch.zeros_like(value)] if wanted[2] else []
            continue
        # A number may as well scale what is found, which saves a pass; half precision would be rounded once more.
        late = weight is None and query.dtype == wide
        grad = grad_out if late or (weight is None and factors[j] == 1) else _weighted(grad_out, weight, factors[j])
        factor = factors[j] if late else 1.0
        found = iter(_branch(attention, grad, query, key, value, attn_masks[j], out, lse, is_causal[j], scale, wanted))
        if needs[0]:
            part = next(found)
            if dq is not None:
                dq.add_(part, alpha=factor)
            elif part.stride() == query.stride():
                dq = part if factor == 1 else part.mul_(factor)
            else:
                dq = torch.mul(part, factor, out=torch.empty_like(query))
        for grads, wants in zip((dks, dvs), wanted[1:], strict=True):
            if wants:
                x = next(found)
                grads.append(x if factor == 1 else x.mul_(factor))
    if needs[0] and dq is None:
        dq = torch.zeros_like(query)
    return [*([] if dq is None else [dq]), *dks, *dvs, *dws]


def _branch(
    attention: ModuleType,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of query, key and value that ``needs`` names."""
    batch, nobody = len(query), [False, False]
    none = query.new_empty(1, key.shape[1], 0, query.shape[3])
    if len(key) == batch:
        return attention.backward(
            grad_out, None, query, key, value, none, none, None, mask, out, lse, is_causal, scale, needs + nobody
        )
    if mask is None and not is_causal:
        d, q, o, level = map(_as_rows, (grad_out, query, out, lse))
        wanted = [needs[0], *nobody, *needs[1:]]
        found = attention.backward(d, None, q, none, none, key, value, None, None, o, level, False, scale, wanted)
        return [found[0][0].unflatten(1, (batch, query.shape[2])).transpose(0, 1), *found[1:]] if needs[0] else found
    wide = torch.promote_types(query.dtype, torch.float32)
    d, q, o, none = (x.to(wide) for x in (grad_out, query, out, none))
    k, v = (x.to(wide).expand(batch, -1, -1, -1) for x in (key, value))
    found = attention.backward(d, None, q, k, v, none, none, None, mask, o, lse, is_causal, scale, needs + nobody)
    inputs = [x for x, need in zip((query, key, value), needs, strict=True) if need]
    return [torch.empty_like(x).copy_(g.sum_to_size(x.shape)) for x, g in zip(inputs, found, strict=True)]


def _as_rows(x: Tensor) -> Tensor:
    """``[B,H,T,...]`` as ``[1,H,B*T,...]``: a view if memory is in the order B, T, H."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
