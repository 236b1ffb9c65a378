# SPDX-License-Identifier: Apache-2.0
"""Every operation in plain PyTorch: readable, any device, any float dtype, gradients derived by autograd."""

import torch
from torch import Tensor


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two attention states over disjoint key sets (identity I1)."""
    peak = torch.maximum(lse_a, lse_b).detach()
    # A side with no keys has lse = -inf; shifting by 0 instead of -inf keeps exp(-inf) = 0 and avoids -inf - -inf.
    peak = torch.where(torch.isfinite(peak), peak, torch.zeros_like(peak))
    mass_a, mass_b = torch.exp(lse_a - peak), torch.exp(lse_b - peak)
    mass = mass_a + mass_b
    dead = mass == 0
    safe = mass.masked_fill(dead, 1.0)
    weight_a, weight_b = (mass_a / safe).unsqueeze(-1), (mass_b / safe).unsqueeze(-1)
    out = weight_a * out_a.to(mass.dtype) + weight_b * out_b.to(mass.dtype)
    lse = (peak + safe.log()).masked_fill(dead, -torch.inf)
    return out.to(out_a.dtype), lse


def joint_mask(query: Tensor, key: Tensor, prompts: int, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Additive mask over [prompt keys, instance keys], broadcastable to ``[B,Hq,Tq,P+Tk]``; None if all is visible."""
    tq, tk = query.shape[2], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    mask = None
    if is_causal:
        visible = torch.ones(tq, tk, dtype=torch.bool, device=query.device).tril(tk - tq)
        mask = torch.zeros(tq, tk, dtype=dtype, device=query.device).masked_fill(~visible, -torch.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=dtype, device=query.device).masked_fill(
                ~attn_mask, -torch.inf
            )
        mask = attn_mask.to(dtype) if mask is None else mask + attn_mask.to(dtype)
        mask = mask.expand(*mask.shape[:-1], tk)
    return None if mask is None else torch.nn.functional.pad(mask, (prompts, 0))


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    prompt_index: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One softmax over [prompts, instance keys], written out."""
    batch, groups = query.shape[0], query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)

    def join(prompt: Tensor, instance: Tensor) -> Tensor:
        prompt = prompt if prompt.dim() == 4 else prompt.unsqueeze(0)
        # Prompts are rounded to the query dtype, as every fast path does; widened before they are shared, so that
        # their gradient is summed in `dtype` and rounded once.
        prompt = prompt.to(query.dtype).to(dtype)
        prompt = prompt[prompt_index] if prompt_index is not None else prompt.expand(batch, -1, -1, -1)
        joined = torch.cat([prompt, instance.to(dtype)], dim=2)
        return joined.repeat_interleave(groups, dim=1)

    keys, values = join(prompt_key, key), join(prompt_value, value)
    scores = scale * (query.to(dtype) @ keys.transpose(-1, -2))
    mask = joint_mask(query, key, prompt_key.shape[-2], attn_mask, is_causal)
    if mask is not None:
        scores = scores + mask
    dead = (scores == -torch.inf).all(dim=-1)
    # A row that sees nothing: finite scores for the softmax, then out = 0, lse = -inf and zero gradients.
    scores = scores.masked_fill(dead.unsqueeze(-1), 0.0)
    out = (scores.softmax(dim=-1).masked_fill(dead.unsqueeze(-1), 0.0)) @ values
    lse = scores.logsumexp(dim=-1).masked_fill(dead, -torch.inf)
    return out.to(query.dtype), lse


def prompt_attention_varlen(
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
    """Prompt attention over packed sequences: unpacked into a padded batch and back."""
    rows, last = torch.arange(query.shape[0], device=query.device), query.shape[0] - 1
    sequence = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    offset = rows - cu_seqlens[sequence]
    # Row j of the padded batch; past the end of a sequence it repeats any row, which no query sees.
    padded = cu_seqlens[:-1, None] + torch.arange(max_seqlen, device=query.device)
    mask = padded < cu_seqlens[1:, None]
    padded = padded.clamp(max=last)
    mask = mask[:, None, None]
    query, key, value = (x[padded].transpose(1, 2) for x in (query, key, value))
    out, lse = prompt_attention(query, key, value, prompt_key, prompt_value, prompt_index, mask, is_causal, scale)
    return out[sequence, :, offset], lse[sequence, :, offset]
