# SPDX-License-Identifier: Apache-2.0
"""CLIP's MLP with frozen weights: one elementwise pass each way, and one tensor kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: QuickGELU is ``x sigmoid(SLOPE x) = silu(SLOPE x) / SLOPE`` (Hendrycks and Gimpel, 2016).
SLOPE = 1.702


class FrozenQuickMLP(torch.autograd.Function):
    """``W_2 g(W_1 x + b_1) + b_2`` with QuickGELU g; the slope and its inverse ride on the products, and cancel behind.

    Rows ``[R,W]``, weights ``[I,W]`` and ``[W,I]``. Only x has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        """The rows behind the MLP."""
        inner = torch.addmm(b1, x, w1.t(), beta=SLOPE, alpha=SLOPE)
        ctx.save_for_backward(inner, w1, w2)
        return torch.addmm(b2, nn.functional.silu(inner), w2.t(), alpha=1 / SLOPE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        inner, w1, w2 = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad @ w2, inner) @ w1, None, None, None, None


def is_frozen_quick(mlp: Any) -> bool:
    """Whether a module with ``fc1``, ``activation_fn`` and ``fc2`` is two plain frozen layers around QuickGELU."""
    layers = (getattr(mlp, "fc1", None), getattr(mlp, "fc2", None))
    act = getattr(mlp, "activation_fn", None)
    if type(act).__name__ != "QuickGELUActivation" or any(map(_is_hooked, (mlp, act, *layers))):
        return False
    return all(
        type(x) is nn.Linear and x.bias is not None and not any(p.requires_grad for p in x.parameters()) for x in layers
    )


def _is_hooked(module: Any) -> bool:
    """Whether calling a module does more than its class says: hooks, or a ``forward`` of its own (offloading)."""
    if not isinstance(module, nn.Module):
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, name) for name in hooks)


def run_mlp(mlp: Any, x: Tensor) -> Tensor:
    """``mlp(x)`` on rows ``[R,W]``, as `FrozenQuickMLP` where it is one and nobody else casts or fuses."""
    cast = torch.is_autocast_enabled(x.device.type)
    if cast or torch.compiler.is_compiling() or not is_frozen_quick(mlp):
        return mlp(x)
    return FrozenQuickMLP.apply(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
