# SPDX-License-Identifier: Apache-2.0
"""`summarize_tokens` on CPU: PyTorch's flash forward over shared queries; a backward of tiled matrix products.

Selectors and their gradient are small beside the tokens. The backward computes weights again, a few samples at a time,
in float32: a selector's gradient is a sum over the batch, which PyTorch's flash backward would round once a sample.
Only the product with the gradient of the output runs in the dtype of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.layouts import dense_rows

# Weights of one tile (elements): few enough for the caches.
TILE = 1 << 20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def forward(selectors: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[T,B,S,C]`` and lse ``[T,B,S]``, contiguous."""
    tasks, count, width = selectors.shape
    shape, lse_dtype = (tasks, len(x), count), torch.promote_types(x.dtype, torch.float32)
    if not selectors.numel() or not x.numel():
        return x.new_zeros(*shape, width), torch.full(shape, -torch.inf, dtype=lse_dtype)
    # The rows of all tasks are the queries of one head, and every sample reads the same.
    query = selectors.to(x.dtype).reshape(1, 1, -1, width).expand(len(x), -1, -1, -1)
    tokens = dense_rows(x).unsqueeze(1)
    out, lse = (t.squeeze(1).unflatten(1, (tasks, count)) for t in _flash(query, tokens, tokens, scale=scale))
    return out.transpose(0, 1).contiguous(), lse.transpose(0, 1).to(lse_dtype).contiguous()


def backward(
    grad_out: Tensor, selectors: Tensor, x: Tensor, out: Tensor, lse: Tensor, scale: float, needs: list[bool]
) -> list[Tensor]:
    """Gradients of the inputs flagged in ``needs`` (selectors, x), in that order."""
    batch, tokens = x.shape[:2]
    wide = lse.dtype
    rows = scale * selectors.flatten(0, 1).to(x.dtype).to(wide)
    dselectors = torch.zeros_like(rows) if needs[0] else None
    dx = x.new_empty(x.shape) if needs[1] else None
    step = max(1, TILE // max(1, tokens * len(rows)))
    for first in range(0, batch, step):
        part = slice(first, first + step)
        xs = x[part].to(wide)
        # [T,b,S,...] -> [b,T*S,...]
        grad, own, level = (t[:, part].transpose(0, 1).flatten(1, 2) for t in (grad_out, out, lse))
        slope = (x[part] @ grad.mT).to(wide)
        grad = grad.to(wide)
        delta = (grad * own).sum(-1)
        weight = (xs @ rows.T).sub_(level.unsqueeze(1)).exp_()
        slope = slope.sub_(delta.unsqueeze(1)).mul_(weight)
        if dselectors is not None:
            dselectors.addmm_(slope.flatten(0, 1).T, xs.flatten(0, 1), alpha=scale)
        if dx is not None:
            dx[part] = torch.baddbmm(slope @ rows, weight, grad)
    dselectors = None if dselectors is None else dselectors.view(selectors.shape).to(selectors.dtype)
    return [t for t in (dselectors, dx) if t is not None]
