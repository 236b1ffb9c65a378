# SPDX-License-Identifier: Apache-2.0
"""Every operation in plain PyTorch: readable, any device, any float dtype, gradients derived by autograd."""

from collections.abc import Sequence

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
    mask = joint_mask(query, key, prompt_key.shape[-2], attn_mask, is_causal)
    out, lse = attend(query.to(dtype), keys, values, mask, scale)
    return out.to(query.dtype), lse


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One softmax over ``[B or 1,Hq,K,D]`` keys that the additive mask lets through, and its log-sum-exp."""
    scores = scale * (query @ keys.transpose(-1, -2))
    if mask is not None:
        scores = scores + mask
    dead = (scores == -torch.inf).all(dim=-1)
    # A row that sees nothing: finite scores for the softmax, then out = 0, lse = -inf and zero gradients.
    scores = scores.masked_fill(dead.unsqueeze(-1), 0.0)
    out = (scores.softmax(dim=-1).masked_fill(dead.unsqueeze(-1), 0.0)) @ values
    return out, scores.logsumexp(dim=-1).masked_fill(dead, -torch.inf)


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


def diffuse_prompts(
    x: Tensor, base: Tensor, prompts: Tensor, keys: Tensor, log_scale: Tensor, activation: str, weight: str
) -> Tensor:
    """What tokens read from prompts, added to the output of their layer, written out; the weight is detached."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Rounded to the dtype of x, as every fast path does.
    prompts, keys = (p.to(x.dtype).to(dtype) for p in (prompts, keys))
    scores = x.to(dtype) @ keys.T
    active = scores.relu() if activation == "relu" else scores.softmax(dim=-1)
    read = active @ prompts
    if weight == "rowmax" and len(prompts):
        read = active.detach().amax(dim=-1, keepdim=True) * read
    return (log_scale.exp() * (base.to(dtype) + read)).to(x.dtype)


def key_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    query_start: int,
    scale: float,
    normalize: str,
    group_reduce: str,
) -> Tensor:
    """Column sums of the attention matrix, written out."""
    tq, tk, heads_kv = query.shape[2], key.shape[2], key.shape[1]
    seen = torch.ones(1, 1, tq, tk, dtype=torch.bool, device=query.device)
    seen[:, :, :query_start] = False
    if is_causal:
        seen = seen.tril(tk - tq)
    if query_mask is not None:
        seen = seen & query_mask[:, None, :, None]
    keys = key.to(lse.dtype).repeat_interleave(query.shape[1] // heads_kv, dim=1)
    scores = scale * (query.to(lse.dtype) @ keys.transpose(-1, -2))
    live = seen & (lse != -torch.inf).unsqueeze(-1)
    sums = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~live, 0.0).sum(dim=2)
    if normalize == "visible":
        sums = sums / seen.sum(dim=2).clamp(min=1)
    sums = sums.unflatten(1, (heads_kv, query.shape[1] // heads_kv))
    found = sums.amax(dim=2) if group_reduce == "max" else getattr(sums, group_reduce)(dim=2)
    return found if key_mask is None else found.masked_fill(~key_mask.unsqueeze(1), 0.0)


def select_keys(
    scores: Tensor, slots: int, budget: Tensor | None, protect: Tensor | None, recent: int, valid: Tensor | None
) -> Tensor:
    """Positions ``[B,Hkv,slots]`` of the keys to keep, ascending; -1 behind those of a head that keeps fewer."""
    length = scores.shape[2]
    if valid is None:
        valid = torch.ones(len(scores), length, dtype=torch.bool, device=scores.device)
    tier = torch.full(valid.shape, 2, device=scores.device)
    if protect is not None:
        tier = tier.masked_fill(protect, 1)
    tier = tier.masked_fill(~valid, 3).unsqueeze(1).expand(scores.shape)
    # A budget below `recent` keeps the last of those.
    room = torch.full(scores.shape[:2], slots, device=scores.device) if budget is None else budget
    last = valid.flip(-1).cumsum(-1).flip(-1).unsqueeze(1) <= room.clamp(max=recent).unsqueeze(-1)
    tier = tier.masked_fill(last & valid.unsqueeze(1), 0)
    # By tier, then score, then position: stable sorts by the last criterion first. No sentinel is added to a score.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(2, tier.gather(2, order).argsort(dim=-1, stable=True))[..., :slots]
    here = (torch.arange(slots, device=scores.device) < room.unsqueeze(-1)) & (tier.gather(2, order) < 3)
    index = order.masked_fill(~here, length).sort(dim=-1).values
    return index.masked_fill(index == length, -1)


def gather_kv(key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values at ``index``; zeros where it is -1."""
    rows, empty = index.clamp(min=0).unsqueeze(-1), (index < 0).unsqueeze(-1)
    kept = (x.gather(2, rows.expand(-1, -1, -1, x.shape[-1])).masked_fill(empty, 0.0) for x in (key, value))
    return next(kept), next(kept)


def evicted(index: Tensor, length: int, valid: Tensor | None) -> Tensor:
    """Bool ``[B,Hkv,Tk]``: valid keys that are not kept, in heads that keep any."""
    left = torch.ones(*index.shape[:2], length + 1, dtype=torch.bool, device=index.device)
    left = left.scatter(2, index.where(index >= 0, length), False)[..., :length] & (index >= 0).any(-1, keepdim=True)
    return left if valid is None else left & valid.unsqueeze(1)


#: Similarities alive at once (elements): few enough for the caches of a CPU, unless that would be too few rows.
SIMILARITIES = 1 << 19
LEAST_ROWS = 16


def nearest_survivor(key: Tensor, kept_key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """For every key the slot of its most cosine-similar survivor, and the similarity."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    rows, columns = (torch.nn.functional.normalize(x.to(dtype), dim=-1) for x in (key, kept_key))
    empty = (index < 0).unsqueeze(-2)
    step = max(LEAST_ROWS, SIMILARITIES // max(1, index.numel()))
    found = []
    for part in rows.split(step, dim=2):
        found.append((part @ columns.transpose(-1, -2)).masked_fill_(empty, -torch.inf).max(dim=-1))
    return torch.cat([f.indices for f in found], dim=2), torch.cat([f.values for f in found], dim=2)


def merge_kv(
    key: Tensor, value: Tensor, index: Tensor, merge: str, merge_keys: bool, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The kept keys and values, with evicted pairs merged into them."""
    kept_key, kept_value = gather_kv(key, value, index)
    if merge == "drop" or not index.shape[2]:
        return kept_key, kept_value
    leaving = evicted(index, key.shape[2], valid)
    # Padding may be anything, and must not reach gradients either.
    sound = key if valid is None else key.masked_fill(~valid[:, None, :, None], 0.0)
    survivor, similarity = nearest_survivor(sound, kept_key, index)
    weight = similarity if merge == "weighted" else torch.full_like(similarity, 0.5 if merge == "pivot" else 1.0)
    weight = weight.where(leaving, 0.0)
    # One row axis for all heads; a pair that stays adds 0 to some survivor.
    first = index.shape[2] * torch.arange(index[..., 0].numel(), device=key.device).view(*index.shape[:2], 1)
    target = (survivor + first).flatten()
    count = weight.new_zeros(index.numel()).index_add(0, target, leaving.flatten().to(weight.dtype))
    count = count.view(*index.shape, 1)

    def merged(x: Tensor, kept: Tensor) -> Tensor:
        sums = weight.new_zeros(index.numel(), x.shape[-1])
        # What is not merged may be anything, NaN in padding too.
        rows = (weight.unsqueeze(-1) * x).masked_fill(~leaving.unsqueeze(-1), 0.0)
        sums = sums.index_add(0, target, rows.flatten(0, 2)).view(kept.shape)
        own = 1 + count / 2 if merge == "pivot" else 1
        return ((own * kept + sums) / (count + 1)).to(x.dtype)

    return merged(key, kept_key) if merge_keys else kept_key, merged(value, kept_value)


def decoupled_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    factors: Sequence[float],
    attn_masks: Sequence[Tensor | None],
    is_causal: Sequence[bool],
    scale: float,
) -> Tensor:
    """A weighted sum of attentions over separate key sets, each with a softmax of its own."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // keys[0].shape[1]
    total = torch.zeros(query.shape, dtype=dtype, device=query.device)
    for key, value, weight, factor, attn_mask, causal in zip(
        keys, values, weights, factors, attn_masks, is_causal, strict=True
    ):
        mask = joint_mask(query, key, 0, attn_mask, causal)
        key, value = (x.to(dtype).repeat_interleave(groups, dim=1) for x in (key, value))
        out, _ = attend(query.to(dtype), key, value, mask, scale)
        total = total + (factor if weight is None else weight.to(dtype).unsqueeze(-1)) * out
    return total.to(query.dtype)


def summarize_tokens(selectors: Tensor, x: Tensor, scale: float) -> Tensor:
    """Softmax pooling of the tokens of every sample, once a selector."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Selectors are defined as rounded to the dtype of x.
    selectors, tokens = selectors.to(x.dtype).to(dtype), x.to(dtype)
    scores = scale * torch.einsum("tsc,bnc->tbsn", selectors, tokens)
    return torch.einsum("tbsn,bnc->tbsc", scores.softmax(-1), tokens).to(x.dtype).contiguous()
