# SPDX-License-Identifier: Apache-2.0
"""float64 oracles, written as the formulas are, with hand-derived gradients; nothing here imports fastprompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("query", "key", "value", "prompt_key", "prompt_value")


class Attention(NamedTuple):
    """Output, log-sum-exp and the gradients of the five tensors, in the order of `NAMES`."""

    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]

    def named(self) -> dict[str, Tensor]:
        return {"out": self.out, "lse": self.lse} | dict(zip(NAMES, self.grads, strict=True))


def additive_mask(attn_mask: Tensor | None, is_causal: bool, shape: tuple[int, ...]) -> Tensor:
    """The mask over instance keys as float64 ``[B,Hq,Tq,Tk]``."""
    mask = torch.zeros(shape, dtype=torch.float64)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = mask.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        mask = mask + attn_mask.double()
    if is_causal:
        tq, tk = shape[2:]
        visible = [[j <= i + tk - tq for j in range(tk)] for i in range(tq)]
        mask = mask.masked_fill(~torch.tensor(visible, dtype=torch.bool).view(tq, tk), -torch.inf)
    return mask


def _sums(p, ds, scale, query, keys, values, d_out) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """O, dQ, dK, dV of one head from P and dS."""
    return p @ values, scale * (ds @ keys), scale * (ds.T @ query), p.T @ d_out


def prompt_attention(
    query, key, value, prompt_key, prompt_value, grad_out=None, grad_lse=None,
    *, prompt_index=None, attn_mask=None, is_causal=False, scale=None,
) -> tuple[Attention, Attention]:  # fmt: skip
    """One softmax over prompts and instance keys, a sample and a head at a time, in float64; and its rounding noise.

    With P the probabilities and L the log-sum-exp: dV = P^T dO, dS = P * (dO V^T - delta + dL), delta = rowsum(dO * O),
    dQ = s dS K, dK = s dS^T Q; a missing ``grad_out`` or ``grad_lse`` is zero.

    The noise is what any algorithm in the query dtype must leave: each summand of those products is rounded once, by
    eps of itself where it is stored and, in the exponent of P, which is float32 or wider, by eps of the score, of L and
    of |q||k| (the partial sums of a dot product). The roundings are independent, so their squares add up by the same
    sums. L adds the error of exp itself: kernels for half precision may round it where fp16 no longer sees it.
    """
    low, wide = torch.finfo(query.dtype).eps, torch.finfo(torch.promote_types(query.dtype, torch.float32)).eps
    exp_noise = 2.0**-13 if query.dtype.itemsize == 2 else wide
    # Prompts are defined as rounded to the query dtype.
    prompt_key, prompt_value = (p.to(query.dtype) for p in (prompt_key, prompt_value))
    inputs = [x.detach().double() for x in (query, key, value, prompt_key, prompt_value)]
    query, key, value, prompt_key, prompt_value = inputs
    if prompt_key.dim() == 3:
        prompt_key, prompt_value = prompt_key[None], prompt_value[None]
    batch, heads, tq, dim = query.shape
    groups, tk, prompts = heads // key.shape[1], key.shape[2], prompt_key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    mask = additive_mask(attn_mask, is_causal, (batch, heads, tq, tk))
    d_out = torch.zeros_like(query) if grad_out is None else grad_out.double()
    d_lse = torch.zeros(batch, heads, tq).double() if grad_lse is None else grad_lse.double()
    lse, lse_noise = torch.full_like(d_lse, -torch.inf), torch.zeros_like(d_lse)
    # For the values and for the squares of the noise: O, dQ, dK, dV, dK_p, dV_p.
    totals = [[torch.zeros_like(x) for x in (query, query, key, value, prompt_key, prompt_value)] for _ in range(2)]
    for b in range(batch):
        g = int(prompt_index[b]) if prompt_index is not None else b if len(prompt_key) == batch else 0
        for h in range(heads):
            kv = h // groups
            q, do = query[b, h], d_out[b, h]
            k, v = torch.cat([prompt_key[g, kv], key[b, kv]]), torch.cat([prompt_value[g, kv], value[b, kv]])
            scores = scale * (q @ k.T)
            scores[:, prompts:] += mask[b, h]
            live = (scores > -torch.inf).any(dim=-1)
            lse[b, h, live] = scores[live].logsumexp(dim=-1)
            p, dp = torch.zeros_like(scores), do @ v.T
            p[live] = (scores[live] - lse[b, h, live, None]).exp()
            delta = (do * (p @ v)).sum(dim=-1, keepdim=True)
            grad_lse_row = d_lse[b, h, :, None]
            ds = p * (dp - delta + grad_lse_row)
            exponent = scores.nan_to_num(neginf=0.0).abs() + lse[b, h, :, None].nan_to_num(neginf=0.0).abs()
            exponent = exponent + abs(scale) * q.norm(dim=-1, keepdim=True) * k.norm(dim=-1)
            lse_noise[b, h, live] = exp_noise + wide * (1 + largest(exponent[live]))
            p_noise = p * (low + wide * exponent)
            ds_noise = p_noise * (dp.abs() + delta.abs() + grad_lse_row.abs())
            noise = (x.square() for x in (p_noise, ds_noise, torch.tensor(scale), q, k, v, do))
            for total, sums in zip(totals, (_sums(p, ds, scale, q, k, v, do), _sums(*noise)), strict=True):
                out, dq, dk, dv, dpk, dpv = total
                out[b, h], dq[b, h] = sums[:2]
                for joined, instance, prompt in ((sums[2], dk, dpk), (sums[3], dv, dpv)):
                    prompt[g, kv] += joined[:prompts]
                    instance[b, kv] += joined[prompts:]
    shapes = [x.shape for x in inputs]
    (out, *grads), (out_noise, *noises) = totals
    noises = [x.sqrt() for x in noises]
    return (
        Attention(out, lse, tuple(x.view(shape) for x, shape in zip(grads, shapes, strict=True))),
        Attention(out_noise.sqrt(), lse_noise, tuple(x.view(shape) for x, shape in zip(noises, shapes, strict=True))),
    )


def plain_prompt_attention(
    query, key, value, prompt_key, prompt_value, grad_out=None, grad_lse=None,
    *, prompt_index=None, attn_mask=None, is_causal=False, scale=None,
) -> Attention:  # fmt: skip
    """The same maths as PyTorch users write it, every intermediate in the query dtype, gradients by autograd."""
    dtype = query.dtype
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value, prompt_key, prompt_value)]
    query, key, value, *prompts = leaves
    batch, heads, tq, dim = query.shape
    prompts = [(p if p.dim() == 4 else p[None]).to(dtype) for p in prompts]
    prompts = [p.expand(batch, -1, -1, -1) if prompt_index is None else p[prompt_index] for p in prompts]
    keys, values = (
        torch.cat([p, x], dim=2).repeat_interleave(heads // key.shape[1], dim=1)
        for p, x in zip(prompts, (key, value), strict=True)
    )
    mask = additive_mask(attn_mask, is_causal, (batch, heads, tq, key.shape[2])).to(dtype)
    mask = torch.nn.functional.pad(mask, (prompts[0].shape[2], 0))
    scores = (query @ keys.transpose(-1, -2)) * (dim**-0.5 if scale is None else scale) + mask
    dead = (mask == -torch.inf).all(dim=-1)
    scores = scores.masked_fill(dead[..., None], 0.0)
    out = scores.softmax(dim=-1).masked_fill(dead[..., None], 0.0) @ values
    lse = scores.to(torch.promote_types(dtype, torch.float32)).logsumexp(dim=-1).masked_fill(dead, -torch.inf)
    given = [(x, g) for x, g in ((out, grad_out), (lse, grad_lse)) if g is not None]
    if not given:
        return Attention(out.detach(), lse.detach(), tuple(torch.zeros_like(x) for x in leaves))
    outputs, grad_outputs = zip(*given, strict=True)
    grads = torch.autograd.grad(outputs, leaves, grad_outputs, materialize_grads=True)
    return Attention(out.detach(), lse.detach(), grads)


def largest(x: Tensor) -> float:
    """The largest finite magnitude; 0 for an empty tensor."""
    x = x.detach()[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def tolerance(exact: Tensor, plain: Tensor, noise: Tensor | None = None) -> float:
    """The largest error allowed: ``2 err_lowp + eps max|ref|``, the field's idiom, plus the rounding noise.

    ``err_lowp`` is the error of the same maths in plain PyTorch in the dtype under test: an implementation may be at
    most twice as bad. One eps of the largest value covers the rounding of the result. That suffices in half precision
    unless terms cancel (one key: dS = 0), where plain PyTorch may be exact by luck; and it does not in float32 and
    float64, where plain PyTorch's softmax divides errors away that exp(score - lse), which flash algorithms use, keeps.
    ``noise``, derived in `prompt_attention` from the exact values, allows those and nothing else.
    """
    eps = torch.finfo(plain.dtype).eps
    return 2 * largest(plain.double() - exact) + eps * largest(exact) + (0.0 if noise is None else largest(noise))


def assert_close(name: str, actual: Tensor, exact: Tensor, allowed: float) -> None:
    """Raise unless shapes and infinities agree, nothing is NaN, and the largest error is within ``allowed``."""
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    actual, exact = actual.detach().double(), exact.double()
    finite = exact.isfinite()
    assert torch.equal(actual[~finite], exact[~finite]), f"{name}: infinities differ"
    assert actual[finite].isfinite().all(), f"{name}: NaN or infinite where the exact value is finite"
    error = largest(actual[finite] - exact[finite])
    assert error <= allowed, f"{name}: largest error {error:.3g}, allowed {allowed:.3g}"
