# SPDX-License-Identifier: Apache-2.0
"""`decoupled_attention` on CPU: prompt attention's CPU path, one branch after the other.

Keys that a batch shares are read with batch stride 0. In the backward the samples become rows of one long sample whose
prompt those keys are, so that their gradient is summed in float32 and rounded once. A mask or causality tells samples
and rows apart: there they stay samples, and their float32 gradients are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.cpu import prompt_attention


def forward(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor | None],
    factors: list[float],
    attn_masks: list[Tensor | None],
    is_causal: list[bool],
    scale: float,
) -> tuple[Tensor, list[Tensor]]:
    """Output ``[B,Hq,Tq,D]`` (memory order B,T,H,D); the lse ``[B,Hq,Tq]`` of every branch, then their outputs."""
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for j, (key, value, weight) in enumerate(zip(keys, values, weights, strict=True)):
        if weight is None and not factors[j]:
            key, value = key[:, :, :0], value[:, :, :0]
        mask = None if attn_masks[j] is None or not key.shape[2] else attn_masks[j]
        key, value = (x.expand(len(query), -1, -1, -1) for x in (key, value))
        none = query.new_empty(1, key.shape[1], 0, query.shape[3])
        out, lse = prompt_attention.forward(query, key, value, none, none, None, mask, is_causal[j], scale)
        outs.append(out)
        lses.append(lse)
    first = len(outs) > 1 and weights[0] is None and factors[0] == 1
    total = outs[0] if first else _weighted(outs[0], weights[0], factors[0])
    for out, weight, factor in zip(outs[1:], weights[1:], factors[1:], strict=True):
        if weight is None:
            total = torch.add(total, out, alpha=factor)
        else:
            total = total + _weighted(out, weight, factor)
    return total, [*lses, *outs]


def _weighted(x: Tensor, weight: Tensor | None, factor: float) -> Tensor:
    """``w x``, in the dtype of ``x``."""
    if weight is None:
        return x * factor
    return (x * weight.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1)).to(x.dtype)


def backward(
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
        grad = grad_out if weight is None and factors[j] == 1 else _weighted(grad_out, weight, factors[j])
        found = iter(_branch(grad, query, key, value, attn_masks[j], out, lse, is_causal[j], scale, wanted))
        if needs[0]:
            part = next(found)
            dq = torch.empty_like(query).copy_(part) if dq is None else dq.add_(part)
        dks += [next(found)] if wanted[1] else []
        dvs += [next(found)] if wanted[2] else []
    if needs[0] and dq is None:
        dq = torch.zeros_like(query)
    return [*([] if dq is None else [dq]), *dks, *dvs, *dws]


def _branch(
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
        return prompt_attention.backward(
            grad_out, None, query, key, value, none, none, None, mask, out, lse, is_causal, scale, needs + nobody
        )
    if mask is None and not is_causal:
        d, q, o, level = map(_as_rows, (grad_out, query, out, lse))
        wanted = [needs[0], *nobody, *needs[1:]]
        found = prompt_attention.backward(
            d, None, q, none, none, key, value, None, None, o, level, False, scale, wanted
        )
        return [found[0][0].unflatten(1, (batch, query.shape[2])).transpose(0, 1), *found[1:]] if needs[0] else found
    wide = torch.promote_types(query.dtype, torch.float32)
    d, q, o, none = (x.to(wide) for x in (grad_out, query, out, none))
    k, v = (x.to(wide).expand(batch, -1, -1, -1) for x in (key, value))
    found = prompt_attention.backward(
        d, None, q, k, v, none, none, None, mask, o, lse, is_causal, scale, needs + nobody
    )
    inputs = [x for x, need in zip((query, key, value), needs, strict=True) if need]
    return [torch.empty_like(x).copy_(g.sum_to_size(x.shape)) for x, g in zip(inputs, found, strict=True)]


def _as_rows(x: Tensor) -> Tensor:
    """``[B,H,T,...]`` as ``[1,H,B*T,...]``: a view if memory is in the order B, T, H."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)
