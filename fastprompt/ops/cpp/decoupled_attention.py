# SPDX-License-Identifier: Apache-2.0
"""`decoupled_attention` on the C++ kernels: few keys in one pass (``csrc/core/decoupled_attention.h``).

Masks, causality and many keys go branch by branch over the kernels of `prompt_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastprompt.ops import branches
from fastprompt.ops.cpp import extension, prompt_attention
from fastprompt.ops.cpp.extension import isa_number, operations
from fastprompt.ops.layouts import dense_rows

#: Most keys of all branches for one pass: ``kMostBranchKeys`` of ``csrc/core/decoupled_attention.h``.
_MOST_KEYS = 512
#: And for bfloat16 where prompt attention has tiles, which are ahead on more. Measured with 512 here, beside a call of
#: `prompt_attention` a branch: bench/results/decoupled_attention-one_pass.jsonl.
_MOST_KEYS_BESIDE_TILES = 192


def in_one_pass(keys: list[Tensor], masked: list[bool], is_causal: list[bool]) -> bool:
    """Whether the kernel for few keys takes these branches; its forward keeps nothing for the backward."""
    if any(masked) or any(is_causal):
        return False
    tiles = keys[0].dtype == torch.bfloat16 and extension.best_isa() == "amx"
    return sum(key.shape[2] for key in keys) <= (_MOST_KEYS_BESIDE_TILES if tiles else _MOST_KEYS)


def forward(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor | None],
    factors: list[float],
    attn_masks: list[Tensor | None],
    is_causal: list[bool],
    scale: float,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Output ``[B,Hq,Tq,D]`` (memory order B,T,H,D) and what `branches` keeps for the backward, if it runs."""
    if not in_one_pass(keys, [mask is not None for mask in attn_masks], is_causal):
        given = (query, keys, values, weights, factors, attn_masks, is_causal, scale, keep)
        return branches.forward(prompt_attention, *given)
    batch, heads, tq, dim = query.shape
    out = query.new_empty(batch, tq, heads, dim).transpose(1, 2)
    operations().decoupled_attention(*_inputs(query, keys, values, weights, factors), scale, isa_number(None), out)
    return out, []


def _used(weights: list[Tensor | None], factors: list[float]) -> list[bool]:
    """Which branches are computed: not those whose weight is the number 0."""
    return [weight is not None or factor != 0 for weight, factor in zip(weights, factors, strict=True)]


def _inputs(query, keys, values, weights, factors):
    """As the kernel reads them: no keys where a branch is not computed, float32 weights of every row."""
    marks = _used(weights, factors)
    keys, values = ([dense_rows(x if used else x[:, :, :0]) for x, used in zip(part, marks, strict=True)]
                    for part in (keys, values))  # fmt: skip
    weights = [None if w is None else w.float().expand(query.shape[:3]) for w in weights]
    return dense_rows(query), keys, values, weights, factors


def backward(
    grad_out: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    weights: list[Tensor | None],
    factors: list[float],
    attn_masks: list[Tensor | None],
    is_causal: list[bool],
    scale: float,
    states: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of those of query, keys, values and weight tensors that ``needs`` names, in their order."""
    if not in_one_pass(keys, [mask is not None for mask in attn_masks], is_causal):
        given = (query, keys, values, weights, factors, attn_masks, is_causal, scale, states, needs)
        return branches.backward(prompt_attention, grad_out, *given)
    n, inputs = len(keys), (query, *keys, *values)
    marks = [True, *_used(weights, factors) * 2]
    grads = [(torch.empty_like if used else torch.zeros_like)(x) if need else None
             for x, used, need in zip(inputs, marks, needs, strict=False)]  # fmt: skip
    written = [None if grad is None else dense_rows(grad) for grad in grads]
    wanted = iter(needs[len(inputs) :])
    full = [query.new_empty(query.shape[:3], dtype=torch.float32) if w is not None and next(wanted) else None
            for w in weights]  # fmt: skip
    operations().decoupled_attention_backward(
        dense_rows(grad_out), *_inputs(query, keys, values, weights, factors), scale, isa_number(None),
        written[0], written[1 : n + 1], written[n + 1 :], full,
    )  # fmt: skip
    # An input whose rows are not dense has a gradient like it.
    found = [
        g if g is w else g.copy_(w) for g, w in zip(grads, written, strict=True) if g is not None and w is not None
    ]
    weighed = [(w, x) for w, x in zip(weights, full, strict=True) if w is not None and x is not None]
    return found + [torch.empty_like(w).copy_(x.sum_to_size(w.shape)) for w, x in weighed]
