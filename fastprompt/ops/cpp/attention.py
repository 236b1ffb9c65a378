# SPDX-License-Identifier: Apache-2.0
"""What batched and packed prompt attention share on the C++ kernels (``csrc/core/prompt_attention.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.cpp.extension import isa_number, operations
from fastprompt.ops.layouts import dense_rows

#: What tells which rows are read: ``prompt_index``, ``attn_mask``, ``cu_seqlens`` (None: batched) and ``max_seqlen``.
Places = tuple[Tensor | None, Tensor | None, Tensor | None, int]


def places(index: Tensor | None, mask: Tensor | None = None, bounds: Tensor | None = None, longest: int = 0) -> Places:
    """As the kernels read them: numbers are dense, a mask has any strides."""
    return _dense(index), mask, _dense(bounds), longest


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(
    inputs: tuple[Tensor, ...],
    where: Places,
    is_causal: bool,
    scale: float,
    isa: str | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write ``out`` and ``lse`` for query, key, value, prompt_key and prompt_value, and give them back."""
    tensors = map(dense_rows, inputs)
    operations().prompt_attention(*tensors, *where, is_causal, scale, isa_number(isa), out, lse)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: tuple[Tensor, ...],
    where: Places,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    needs: list[bool],
    isa: str | None,
) -> list[Tensor]:
    """Gradients of the ``inputs`` flagged in ``needs``, in that order."""
    grads = [torch.empty_like(x) if need else None for x, need in zip(inputs, needs, strict=True)]
    written = [None if g is None else dense_rows(g) for g in grads]
    operations().prompt_attention_backward(
        dense_rows(grad_out), grad_lse, *map(dense_rows, inputs), *where, dense_rows(out), lse, is_causal, scale,
        isa_number(isa), *written,
    )  # fmt: skip
    # An input whose rows are not dense has a gradient like it.
    return [g if g is w else g.copy_(w) for g, w in zip(grads, written, strict=True) if g is not None and w is not None]
