# SPDX-License-Identifier: Apache-2.0
"""`prompt_attention_varlen` in Triton: the kernels of `prompt_attention` over rows that ``cu_seqlens`` cuts."""

from __future__ import annotations

import torch
from torch import Tensor

from .prompt_attention import Problem, allocate, plan_backward, plan_forward


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
    problem = _problem(
        query, key, value, prompt_key, prompt_value, cu_seqlens, prompt_index, max_seqlen, is_causal, scale
    )
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    plan_forward(problem, _view(out), _view(lse)).run()
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
) -> list[Tensor]:
    """Gradients of those of the five tensors that ``needs`` names, in their order."""
    problem = _problem(
        query, key, value, prompt_key, prompt_value, cu_seqlens, prompt_index, max_seqlen, is_causal, scale
    )
    grads = allocate(problem, needs)
    states = (_view(out), _view(lse), _view(grad_out), None if grad_lse is None else _view(grad_lse))
    for step in plan_backward(problem, *states, grads):
        step.run()
    instance = [x if x is None else x.squeeze(0).transpose(0, 1) for x in grads[:3]]
    return [x for x in (*instance, *grads[3:]) if x is not None]
