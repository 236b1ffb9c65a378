# SPDX-License-Identifier: Apache-2.0
"""What compression is held against: attention as a matrix, and a full cache whose dropped keys are masked."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from tiny_decoders import IMAGE, PAD, PREFIXES, image_inputs
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from fastprompt.cache import Observed, Policy, compress
from fastprompt.hf import cache_layer
from fastprompt.hf.sites import choose_tower


def probabilities(query: Tensor, key: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Causal attention ``[B,Hq,T,T]`` and its log-sum-exp, rows of padding zero and -inf."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.shape[-1] ** -0.5 * query @ key.transpose(-1, -2)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if valid is not None:
        hidden = hidden | ~valid[:, None, None] | ~valid[:, None, :, None]
    lse = scores.masked_fill(hidden, -torch.inf).logsumexp(dim=-1)
    return (scores - lse[..., None]).exp().masked_fill(hidden, 0.0), lse


def observe(query: Tensor, key: Tensor, value: Tensor, valid=None, text=None, layer: int = 0) -> Observed:
    """All that a policy may read of a layer, from the materialised matrix."""
    attention, lse = probabilities(query, key, valid)
    sums = attention.sum(dim=2).unflatten(1, (key.shape[1], -1)).mean(dim=2)
    return Observed(key, value, valid, text, sums, query, lse, query.shape[-1] ** -0.5, layer)


def states(seed: int = 0, batch: int = 2, length: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, keys and values of 2."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, length, 8) for heads in (4, 2, 2))
    query, key, value = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return 2 * query, key, value


def prompts(padding: str | None = None) -> dict[str, Tensor]:
    """Three sentences of token ids, padded to one length on a side."""
    length = 30
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.full((3, length), PAD), torch.zeros(3, length, dtype=torch.long)
    for i, n in enumerate((length, 21, 12) if padding else (length,) * 3):
        place = slice(length - n, length) if padding == "left" else slice(0, n)
        ids[i, place] = torch.randint(3, 40, (n,), generator=generator)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def inputs(name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Left-padded prompts, with images if the model reads them."""
    return image_inputs(name, model) if hasattr(model.config, "image_token_id") else prompts("left")


def generate(model: PreTrainedModel, batch: dict, **options):
    """Ten tokens and the scores they were chosen by."""
    torch.manual_seed(4)
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    return model.generate(
        **batch, eos_token_id=None, pad_token_id=PAD, suppress_tokens=[IMAGE, 51, 52, 53],
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip


class Kept:
    """Records which tokens of the sequence every layer of a compressing cache holds."""

    def __init__(self, monkeypatch):
        self.positions: dict[int, Tensor] = {}
        self.seen: dict[int, int] = {}
        self.policies: list[Policy] = []
        monkeypatch.setattr(cache_layer, "compress", self._compress)

    def _compress(self, policy, seen, budget):
        found = compress(policy, seen, budget)
        batch, heads, length, _ = seen.key.shape
        held = self.positions.get(seen.layer, torch.zeros(batch, heads, 0, dtype=torch.long))
        start = self.seen.get(seen.layer, 0)
        new = torch.arange(start, start + length - held.shape[2]).expand(batch, heads, -1)
        index = found[2]
        positions = torch.cat([held, new], dim=2).gather(2, index.clamp(min=0))
        self.positions[seen.layer] = positions.masked_fill(index < 0, -1)
        self.seen[seen.layer] = start + new.shape[2]
        self.policies.append(policy)
        return found

    def allowed(self, layer: int) -> Tensor:
        """Bool ``[B,Hkv,seen]``: which tokens are still there, merged ones not."""
        positions = self.positions[layer]
        found = torch.zeros(*positions.shape[:2], self.seen[layer] + 1, dtype=torch.bool)
        # The last slot takes what stands for nothing.
        found.scatter_(2, positions.where(positions >= 0, self.seen[layer]), True)
        return found[:, :, :-1]

    def apply(self, model: PreTrainedModel) -> None:
        """Hide from a model's decoder, after the prompt, what was dropped."""
        attentions = choose_tower(model, "text").attentions
        ALLOWED.update({attentions[layer]: self.allowed(layer) for layer in self.positions})


ALLOWED: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def masked_attention(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """Attention in plain matrix products; after the prompt, keys that `ALLOWED` does not have are hidden."""
    hidden = query.new_zeros(1, 1, query.shape[2], key.shape[2]) if attention_mask is None else attention_mask
    if attention_mask is None and is_causal:
        hidden = hidden.masked_fill(torch.ones_like(hidden).triu(1).bool(), -torch.inf)
    groups = query.shape[1] // key.shape[1]
    if module in ALLOWED and key.shape[2] > query.shape[2]:
        allowed = ALLOWED[module].repeat_interleave(groups, dim=1)[:, :, None]
        allowed = torch.nn.functional.pad(allowed, (0, key.shape[2] - allowed.shape[-1]), value=True)
        hidden = hidden.masked_fill(~allowed, -torch.inf)
    if module in PREFIXES:
        prefix_key, prefix_value = (x.to(key.dtype).expand(len(key), -1, -1, -1) for x in PREFIXES[module]())
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        hidden = torch.nn.functional.pad(hidden, (prefix_key.shape[2], 0))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = scaling * query @ key.transpose(-1, -2) + hidden
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


def with_masks(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose attention is `masked_attention`."""
    AttentionInterface.register("tests_masked", masked_attention)
    AttentionMaskInterface.register("tests_masked", eager_mask)
    model.set_attn_implementation("tests_masked")
    return model


@torch.no_grad()
def stepwise(model, batch, steps, cache=None, before=lambda: None):
    """float64 logits of the last prompt token and of ``steps`` given tokens after it; ``before`` runs between them."""
    generator = torch.Generator().manual_seed(3)
    given = torch.randint(3, 40, (len(batch["input_ids"]), steps), generator=generator)
    mask, found = batch["attention_mask"], []
    out = model(**batch, past_key_values=cache, use_cache=True)
    for i in range(steps + 1):
        found.append(out.logits[:, -1])
        if i == steps:
            return torch.stack(found), out.past_key_values
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        before()
        tokens = given[:, i : i + 1]
        out = model(input_ids=tokens, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
