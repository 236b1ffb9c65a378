# SPDX-License-Identifier: Apache-2.0
"""`diffuse_prompts` on CPU: matrix products over tiles of tokens; scale, sum and base are part of the last of them.

What is as large as x is touched by matrix products alone: the weight and ``exp(log_scale)`` go to the activations,
which are P wide, and base enters through the product that reads the prompts. Sums over tokens are products of half
precision too, and of what their rounding took, instead of float32 products of widened copies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Activations of one tile (elements): few enough for the caches.
TILE = 1 << 20
# A dot product in half precision is the trace of a matrix product of this many rows, which accumulates in float32.
LANES = 32


def forward(
    x: Tensor, base: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor, activation: str, weight: str
) -> Tensor:
    """Output ``[B,N,C]``, contiguous."""
    if x.dtype == torch.float16:
        # Scores may pass the largest float16, and CPUs have no fast float16 products to lose.
        prompts, keys = (p.half().float() for p in (prompts, keys))
        return forward(x.float(), base.float(), prompts, keys, log_scale, activation, weight).half()
    factor = log_scale.exp().item()
    out = base.new_empty(base.shape)
    prompts, keys = (p.to(x.dtype) for p in (prompts, keys))
    keys_by_width = keys.T.contiguous()
    x, base, flat = (t.flatten(0, 1) for t in (x, base, out))
    for rows in _tiles(x, keys):
        active = _activate(x[rows] @ keys_by_width, activation)
        active *= _peak(active, 1, weight) * factor
        torch.addmm(base[rows], active, prompts, beta=factor, out=flat[rows])
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    base: Tensor | None,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    activation: str,
    weight: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the inputs flagged in ``needs`` (x, base, prompts, keys, log_scale), in that order."""
    # Every element of dx and dbase is written; the others are sums.
    grads = [x.new_empty(x.shape) if need else None for need in needs[:2]]
    grads += [
        t.new_zeros(t.shape) if need else None for t, need in zip((prompts, keys, log_scale), needs[2:], strict=True)
    ]
    if x.dtype == torch.float16:
        prompts, keys = (p.half().float() for p in (prompts, keys))
        wide = None if base is None else base.float()
        found = backward(grad_out.float(), x.float(), wide, prompts, keys, log_scale, activation, weight, needs)
        kept = (t for t in grads if t is not None)
        return [grad.copy_(exact) for grad, exact in zip(kept, found, strict=True)]
    _write(grad_out, x, base, prompts, keys, log_scale.exp().item(), activation, weight, *grads)
    return [grad for grad in grads if grad is not None]


def _write(grad_out, x, base, prompts, keys, factor, activation, weight, dx, dbase, dprompts, dkeys, dscale) -> None:
    """Every gradient that is not None, from zeros."""
    if dbase is not None:
        torch.mul(grad_out, factor, out=dbase)
    if dscale is not None and dprompts is None:
        dprompts = torch.zeros_like(prompts)
    prompts, keys = (p.to(x.dtype) for p in (prompts, keys))
    prompts_by_width, keys_by_width = (p.T.contiguous() for p in (prompts, keys))
    grad_out, x, base, dx = (None if t is None else t.flatten(0, 1) for t in (grad_out, x, base, dx))
    for rows in _tiles(x, keys):
        grad = grad_out[rows]
        active = _activate(x[rows] @ keys_by_width, activation)
        # A row a prompt: what sums over tokens read fastest, and a maximum over prompts too.
        columns = active.T.clone(memory_format=torch.contiguous_format)
        peak = _peak(columns, 0, weight) * factor
        if dprompts is not None:
            _add_product(dprompts, columns.mul_(peak), grad)
        if dx is not None or dkeys is not None:
            slope = (grad @ prompts_by_width).mul_(peak.T)
            if activation == "relu":
                torch.ops.aten.threshold_backward(slope, active, 0, grad_input=slope)
            else:
                torch._softmax_backward_data(slope, active, -1, active.dtype, grad_input=slope)
            if dx is not None:
                torch.mm(slope, keys, out=dx[rows])
            if dkeys is not None:
                _add_product(dkeys, columns.copy_(slope.T), x[rows])
        if dscale is not None:
            dscale += factor * _dot(grad, base[rows], dscale.dtype)
    if dscale is not None:
        # What tokens read times its gradient: summed over tokens, that is prompts times theirs.
        dscale += (dprompts * prompts).sum()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, in its dtype: products of bfloat16 are fast, accumulate in float32 and round once,
    so a second one gives what that rounding took.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    rounded = a @ b
    total += rounded
    total += torch.addmm(rounded, a, b, beta=-1)


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of all products, accumulated in ``dtype``."""
    if a.dtype == dtype:
        return torch.dot(a.flatten(), b.flatten())
    lanes = math.gcd(LANES, a.numel())
    sums = torch.zeros(lanes, lanes, dtype=dtype)
    _add_product(sums, a.reshape(lanes, -1), b.reshape(lanes, -1).T)
    return sums.trace()


def _tiles(x: Tensor, keys: Tensor) -> Iterator[slice]:
    """Runs of rows whose activations fill a tile."""
    step = max(1, TILE // max(1, len(keys)))
    return (slice(first, first + step) for first in range(0, len(x), step))


def _activate(scores: Tensor, activation: str) -> Tensor:
    """Activations, in the memory of ``scores``."""
    return scores.relu_() if activation == "relu" else torch.softmax(scores, dim=-1, out=scores)


def _peak(active: Tensor, dim: int, weight: str) -> Tensor:
    """The weight of each token."""
    if weight == "rowmax" and active.shape[dim]:
        return active.amax(dim, keepdim=True)
    return active.new_ones(1, 1)
