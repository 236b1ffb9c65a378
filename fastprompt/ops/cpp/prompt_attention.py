# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention` on the C++ kernels (``csrc/core/prompt_attention.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.cpp import attention

_MASKS = (torch.bool, torch.float32, torch.bfloat16, torch.float16)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B,Hq,Tq,D]`` and lse ``[B,Hq,Tq]``; ``isa`` forces a level of the kernels, for tests."""
    batch, heads, tq, dim = query.shape
    out = query.new_empty(batch, tq, heads, dim).transpose(1, 2)
    lse = query.new_empty(batch, heads, tq, dtype=torch.float32)
    inputs = (query, key, value, prompt_key, prompt_value)
    where = attention.places(prompt_index, _mask(attn_mask, query, key))
    return attention.forward(inputs, where, is_causal, scale, isa, out, lse)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    attn_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    needs: list[bool],
    isa: str | None = None,
) -> list[Tensor]:
    """Gradients of the inputs flagged in ``needs`` (query, key, value, prompt_key, prompt_value), in that order."""
    inputs = (query, key, value, prompt_key, prompt_value)
    where = attention.places(prompt_index, _mask(attn_mask, query, key))
    return attention.backward(grad_out, grad_lse, inputs, where, out, lse, is_causal, scale, needs, isa)


def _mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as a view ``[B,Hq,Tq,Tk]`` of a type that the kernels read."""
    if attn_mask is None:
        return None
    mask = attn_mask if attn_mask.dtype in _MASKS else attn_mask.float()
    return mask.expand(*query.shape[:3], key.shape[2])
