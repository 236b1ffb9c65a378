# SPDX-License-Identifier: Apache-2.0
"""`diffuse_prompts` on the C++ kernels (``csrc/core/diffuse_prompts.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.cpp.extension import isa_number, operations
from fastprompt.ops.layouts import dense_rows


def forward(
    x: Tensor,
    base: Tensor,
    prompts: Tensor,
    keys: Tensor,
    log_scale: Tensor,
    activation: str,
    weight: str,
    isa: str | None = None,
) -> Tensor:
    """Output ``[B,N,C]``, contiguous; ``isa`` forces a level of the kernels, for tests."""
    out = x.new_empty(x.shape)
    options = (log_scale.exp().item(), activation == "softmax", weight == "rowmax", isa_number(isa))
    operations().diffuse_prompts(*map(dense_rows, (x, base, prompts, keys)), *options, out)
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
    isa: str | None = None,
) -> list[Tensor]:
    """Gradients of the inputs flagged in ``needs`` (x, base, prompts, keys, log_scale), in that order."""
    options = (log_scale.exp().item(), activation == "softmax", weight == "rowmax", isa_number(isa))
    grads = [t.new_empty(t.shape) if need else None for t, need in zip((x, x, prompts, keys), needs, strict=False)]
    # One number, whatever the type of log_scale.
    scale = log_scale.new_empty((), dtype=torch.float32) if needs[4] else None
    operations().diffuse_prompts_backward(
        dense_rows(grad_out), dense_rows(x), None if base is None else dense_rows(base), dense_rows(prompts),
        dense_rows(keys), *options, *grads, scale,
    )  # fmt: skip
    found = [grad for grad in grads if grad is not None]
    return found if scale is None else [*found, scale.to(log_scale.dtype)]
