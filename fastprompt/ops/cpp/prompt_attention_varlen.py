# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention_varlen` on the C++ kernels (``csrc/core/prompt_attention.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.cpp.extension import isa_number, operations
from fastprompt.ops.layouts import dense_rows


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
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[T,Hq,D]`` and lse ``[T,Hq]``; ``isa`` forces a level of the kernels, for tests."""
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    tensors = map(dense_rows, (query, key, value, prompt_key, prompt_value))
    index = None if prompt_index is None else prompt_index.contiguous()
    packed = (index, None, cu_seqlens.contiguous(), max_seqlen)
    operations().prompt_attention(*tensors, *packed, is_causal, scale, isa_number(isa), out, lse)
    return out, lse


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
    isa: str | None = None,
) -> list[Tensor]:
    """Gradients of the inputs flagged in ``needs`` (query, key, value, prompt_key, prompt_value), in that order."""
    inputs = (query, key, value, prompt_key, prompt_value)
    grads = [torch.empty_like(x) if need else None for x, need in zip(inputs, needs, strict=True)]
    written = [None if g is None else dense_rows(g) for g in grads]
    operations().prompt_attention_backward(
        dense_rows(grad_out), grad_lse, *map(dense_rows, inputs),
        None if prompt_index is None else prompt_index.contiguous(), None, cu_seqlens.contiguous(), max_seqlen,
        dense_rows(out), lse, is_causal, scale, isa_number(isa), *written,
    )  # fmt: skip
    # An input whose rows are not dense has a gradient like it.
    return [g if g is w else g.copy_(w) for g, w in zip(grads, written, strict=True) if g is not None and w is not None]
