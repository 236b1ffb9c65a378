# SPDX-License-Identifier: Apache-2.0
"""Memory layouts that kernels ask for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension is not dense; CPU kernels take every other stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def plain_strides(x: Tensor) -> Tensor:
    """``x``, copied only if its last dimension is not dense or one is expanded: what every CUDA library takes."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def like(x: Tensor, y: Tensor) -> Tensor:
    """``y``, copied only if it does not lie in memory as ``torch.empty_like(x)``, which has its shape, would."""
    strides = zip(y.shape, y.stride(), torch.empty_like(x, device="meta").stride(), strict=True)
    return y if all(n == 1 or found == want for n, found, want in strides) else torch.empty_like(x).copy_(y)


def empty_grads(tensors: Sequence[Tensor], needs: Sequence[bool], impl: str) -> list[Tensor]:
    """Gradients of the five tensors of prompt attention in the layouts that launchers give them.

    Those are the layouts of ``empty_like``, but what runs on CUDA sums the gradients of prompts in a contiguous tensor.
    """
    contiguous = impl not in ("cpu", "cpp")
    formats = [torch.preserve_format] * 3 + [torch.contiguous_format if contiguous else torch.preserve_format] * 2
    found = zip(tensors, needs, formats, strict=True)
    return [torch.empty_like(x, memory_format=layout) for x, need, layout in found if need]
