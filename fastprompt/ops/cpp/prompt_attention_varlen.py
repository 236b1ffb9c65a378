# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention_varlen` on the C++ kernels (``csrc/core/prompt_attention.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.cpp import attention


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
    inputs = (query, key, value, prompt_key, prompt_value)
    where = attention.places(prompt_index, None, cu_seqlens, max_seqlen)
    return attention.forward(inputs, where, is_causal, scale, isa, out, lse)


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
    where = attention.places(prompt_index, None, cu_seqlens, max_seqlen)
    return attention.backward(grad_out, grad_lse, inputs, where, out, lse, is_causal, scale, needs, isa)
