# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention` on the C++ kernels (``csrc/core/prompt_attention.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops.cpp.extension import isa_number, operations
from fastprompt.ops.layouts import dense_rows

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
    tensors = map(dense_rows, (query, key, value, prompt_key, prompt_value))
    mask = _mask(attn_mask, query, key)
    index = None if prompt_index is None else prompt_index.contiguous()
    operations().prompt_attention(*tensors, index, mask, None, 0, is_causal, scale, isa_number(isa), out, lse)
    return out, lse


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
    grads = [torch.empty_like(x) if need else None for x, need in zip(inputs, needs, strict=True)]
    written = [None if g is None else dense_rows(g) for g in grads]
    operations().prompt_attention_backward(
        dense_rows(grad_out), grad_lse, *map(dense_rows, inputs),
        None if prompt_index is None else prompt_index.contiguous(), _mask(attn_mask, query, key), None, 0,
        dense_rows(out), lse, is_causal, scale, isa_number(isa), *written,
    )  # fmt: skip
    # An input whose rows are not dense has a gradient like it.
    return [g if g is w else g.copy_(w) for g, w in zip(grads, written, strict=True) if g is not None and w is not None]


def _mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as a view ``[B,Hq,Tq,Tk]`` of a type that the kernels read."""
    if attn_mask is None:
        return None
    mask = attn_mask if attn_mask.dtype in _MASKS else attn_mask.float()
    return mask.expand(*query.shape[:3], key.shape[2])
