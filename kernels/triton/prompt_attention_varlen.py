# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention_varlen` in Triton: the kernels of `prompt_attention` over rows that ``cu_seqlens`` cuts."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import launch
from .prompt_attention import Problem, allocate, array, plan_backward, plan_forward, readers, rounded


def _view(x: Tensor) -> Tensor:
    """``[T,H,D]`` as ``[1,H,T,D]``, ``[T,H]`` as ``[1,H,T]``."""
    return x.transpose(0, 1).unsqueeze(0)


def _problem(
    query, key, value, prompt_key, prompt_value, cu_seqlens, prompt_index, max_seqlen, is_causal, scale
) -> Problem:
    return Problem(
        _view(query), _view(key), _view(value), prompt_key, prompt_value, prompt_index, None, is_causal, scale,
        cu_seqlens, max_seqlen,
    )  # fmt: skip


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
) -> tuple[Tensor, Tensor]:
    """Output ``[T,Hq,D]`` and lse ``[T,Hq]`` float32."""
    tensors = (query, key, value, prompt_key, prompt_value, array(cu_seqlens), array(prompt_index))
    out, lse = launch(_forward, tensors, (max_seqlen, is_causal, scale))
    return out, lse


def _forward(
    query, key, value, prompt_key, prompt_value, cu_seqlens, prompt_index, max_seqlen, is_causal, scale
):  # fmt: skip
    problem = _problem(
        query, key, value, prompt_key, prompt_value, cu_seqlens, prompt_index, max_seqlen, is_causal, scale
    )
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    return [out, lse], [plan_forward(problem, _view(out), _view(lse))]


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
) -> list[Tensor]:
    """Gradients of those of the five tensors that ``needs`` names, in their order."""
    ends, index, kinds = array(cu_seqlens), array(prompt_index), (prompt_key.dtype, prompt_value.dtype)
    order, starts = readers(_view(query), prompt_key, index, ends) if needs[3] or needs[4] else (None, None)
    tensors = (
        grad_out, grad_lse, query, key, value, *rounded(query, prompt_key, prompt_value), ends, index, out, lse, order,
        starts,
    )  # fmt: skip
    return launch(_backward, tensors, (max_seqlen, is_causal, scale, tuple(needs), kinds))


def _backward(
    grad_out, grad_lse, query, key, value, prompt_key, prompt_value, cu_seqlens, prompt_index, out, lse, order, starts,
    max_seqlen, is_causal, scale, needs, kinds,
):  # fmt: skip
    problem = _problem(
        query, key, value, prompt_key, prompt_value, cu_seqlens, prompt_index, max_seqlen, is_causal, scale
    )
    grads = allocate(problem, needs, kinds)
    states = (_view(out), _view(lse), _view(grad_out), None if grad_lse is None else _view(grad_lse))
    plan = plan_backward(problem, *states, grads, order, starts)
    instance = [x if x is None else x.squeeze(0).transpose(0, 1) for x in grads[:3]]
    return [x for x in (*instance, *grads[3:]) if x is not None], plan
