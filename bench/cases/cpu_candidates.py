# SPDX-License-Identifier: Apache-2.0
"""Candidates for the CPU path of `prompt_attention` on DINOv2-S shapes, forward and backward, and the one kept.

Providers: `floor` (SDPA without prompts), `concat_sdpa` (what autograd does with expanded and concatenated keys),
`merged_flash` (one flash call over instance keys and one over prompts with the batch folded into rows, merged by lse,
each with its flash backward on the merged state), `concat_flash` and `tiled` (our forward with either backward), and
`fastprompt`, which takes the tiled backward in half precision and the flash backward otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Case, Provider, Step, tolerance
from fastprompt.ops import merge_states, prompt_attention
from fastprompt.ops.cpu import prompt_attention as cpu

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def build(
    device: str, batch: int = 16, heads: int = 6, tokens: int = 257, dim: int = 64, prompts: int = 100,
    dtype: str = "bfloat16",
) -> Case:  # fmt: skip
    """The case."""
    kind = getattr(torch, dtype)
    torch.manual_seed(0)

    def tensor(b: int, t: int, grad: bool = True) -> Tensor:
        return torch.randn(b, t, heads, dim, device=device).to(kind).transpose(1, 2).requires_grad_(grad)

    query, key, value = (tensor(batch, tokens) for _ in range(3))
    prompt_key, prompt_value = tensor(1, prompts), tensor(1, prompts)
    grad = tensor(batch, tokens, grad=False)
    inputs = (query, key, value, prompt_key, prompt_value)
    scale = dim**-0.5

    def step(function: Callable[..., Tensor], used: int = 5) -> Step:
        def run() -> list[Tensor]:
            out = function(*inputs[:used])
            return [out.detach(), *torch.autograd.grad(out, inputs[:used], grad)]

        return run

    def concat(q, k, v, pk, pv):
        keys, values = (torch.cat([p.expand(batch, -1, -1, -1), x], 2) for p, x in ((pk, k), (pv, v)))
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values)

    def provider(function: Callable[..., Tensor], why_not: str | None = None) -> Provider:
        return Provider(lambda: step(function), step(function), why_not)

    no_cpu = None if device == "cpu" else "composed of PyTorch's CPU attention"
    providers = {
        "floor": Provider(lambda: step(torch.nn.functional.scaled_dot_product_attention, used=3)),
        "concat_sdpa": provider(concat),
        "fastprompt": provider(prompt_attention),
        "merged_flash": provider(lambda *x: _MergedFlash.apply(*x, scale), no_cpu),
        "concat_flash": provider(lambda *x: _Ours.apply(*x, scale, True), no_cpu),
        "tiled": provider(lambda *x: _Ours.apply(*x, scale, False), no_cpu),
    }

    def reference() -> list[Tensor]:
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out = prompt_attention(*exact, impl="reference")
        return [out.detach(), *torch.autograd.grad(out, exact, grad.double())]

    params = {"batch": batch, "heads": heads, "tokens": tokens, "dim": dim, "prompts": prompts, "dtype": dtype}
    return Case("cpu_candidates", providers, "concat_sdpa", reference, tolerance(kind), params)


class _MergedFlash(torch.autograd.Function):
    """Two flash calls and a merge; the backward of each branch reads the merged output and lse."""

    @staticmethod
    def forward(ctx, query, key, value, prompt_key, prompt_value, scale):
        out_x, lse_x = flash(query, key, value, scale=scale)
        out_p, lse_p = flash(_fold(query), prompt_key, prompt_value, scale=scale)
        out_p, lse_p = _unfold(out_p, len(query)), _unfold(lse_p.unsqueeze(-1), len(query)).squeeze(-1)
        out, lse = merge_states(out_x, lse_x, out_p, lse_p)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, prompt_key, prompt_value, out, lse = ctx.saved_tensors
        dq, dk, dv = flash_backward(grad, query, key, value, out, lse, 0.0, False, scale=ctx.scale)
        rows = (_fold(grad), _fold(query), prompt_key, prompt_value, _fold(out), _fold(lse.unsqueeze(-1)).squeeze(-1))
        dq_p, dk_p, dv_p = flash_backward(*rows, 0.0, False, scale=ctx.scale)
        return dq + _unfold(dq_p, len(query)), dk, dv, dk_p, dv_p, None


def _fold(x: Tensor) -> Tensor:
    """``[B,H,T,D]`` as ``[1,H,B*T,D]``."""
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)


def _unfold(x: Tensor, batch: int) -> Tensor:
    """``[1,H,B*T,D]`` as ``[B,H,T,D]``."""
    return x.transpose(1, 2).squeeze(0).unflatten(0, (batch, -1)).transpose(1, 2)


class _Ours(torch.autograd.Function):
    """The forward of the CPU path with one of its two backwards, whatever the dtype."""

    @staticmethod
    def forward(ctx, query, key, value, prompt_key, prompt_value, scale, by_flash):
        out, lse = cpu.forward(query, key, value, prompt_key, prompt_value, None, None, False, scale)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, out, lse)
        ctx.scale, ctx.by_flash = scale, by_flash
        return out

    @staticmethod
    def backward(ctx, grad):
        *inputs, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in inputs]
        if ctx.by_flash:
            cpu._by_flash(grad, inputs, None, None, out, lse, ctx.scale, grads)
        else:
            heads = slice(0, inputs[1].shape[1])
            cpu._Heads(heads, grad, None, inputs, None, None, out, lse, lse, ctx.scale, grads).run()
        return *grads, None, None
