# SPDX-License-Identifier: Apache-2.0
"""Prefill of a decoder and compression of its cache to a fifth, SmolLM2-135M shapes, random weights.

Providers: `plain` (no compression), `observed` (H2O's scores as libraries take them today: every layer builds its
attention matrix, sums its columns, and drops keys by plain PyTorch), and fastprompt's policies. Prefill is exact in all
of them: the logits of the last token are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

import fastprompt
from bench.case import Case, Provider, Step, composed
from bench.measure import too_large

POLICIES: dict[str, Callable[[float], Any]] = {
    "h2o": lambda keep: fastprompt.H2O(recent=keep / 2, important=keep / 2),
    "lookm": lambda keep: fastprompt.LookM(recent=keep / 2, important=keep / 2, text_prior=False),
    "snapkv": lambda keep: fastprompt.SnapKV(keep=keep),
    "keydiff": lambda keep: fastprompt.KeyDiff(keep=keep),
    "streamingllm": lambda keep: fastprompt.StreamingLLM(keep=keep),
}
OBSERVED = "bench_observed"


def observed_attention(module, query, key, value, attention_mask, scaling=None, **kwargs) -> tuple[Tensor, None]:
    """Eager attention that leaves the mean attention of every key on its module, as kvpress' observed attention."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ keys.mT * scaling
    rows, columns = scores.shape[-2:]
    hidden = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu_(columns - rows + 1)
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    seen = torch.arange(columns, 0, -1, device=query.device)
    module.observed = (weights.float().sum(2) / seen).unflatten(1, (-1, groups)).mean(2)
    return (weights @ values).transpose(1, 2).contiguous(), None


def decoder(device: str, kind: torch.dtype, layers: int, width: int, vocab: int, tokens: int) -> LlamaForCausalLM:
    """The model, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=width * 8 // 3, vocab_size=vocab, tie_word_embeddings=True,
        max_position_embeddings=2 * tokens, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device, kind).eval()


def build(
    device: str, tokens: int = 4096, keep: float = 0.2, layers: int = 30, width: int = 576, vocab: int = 49152,
    dtype: str = "bfloat16",
) -> Case:  # fmt: skip
    """The case; ``layers``, ``width`` and ``vocab`` make a quick version."""
    kind = getattr(torch, dtype)
    ids = torch.randint(vocab, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)

    def model(chosen: torch.dtype = kind) -> LlamaForCausalLM:
        return decoder(device, chosen, layers, width, vocab, tokens)

    def plain(chosen: torch.dtype = kind) -> Step:
        lm = model(chosen)

        def run() -> list[Tensor]:
            with torch.no_grad():
                return [lm(input_ids=ids, past_key_values=DynamicCache(config=lm.config), logits_to_keep=1).logits]

        return run

    def observed() -> Step:
        AttentionInterface.register(OBSERVED, observed_attention)
        AttentionMaskInterface.register(OBSERVED, sdpa_mask)
        lm = model()
        lm.set_attn_implementation(OBSERVED)

        def run() -> list[Tensor]:
            cache = DynamicCache(config=lm.config)
            with torch.no_grad():
                logits = lm(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
                for layer, held in zip(lm.model.layers, cache.layers, strict=True):
                    index = layer.self_attn.observed.topk(int(keep * tokens), dim=-1).indices.unsqueeze(-1)
                    held.keys, held.values = (
                        x.gather(2, index.expand(-1, -1, -1, x.shape[-1])) for x in (held.keys, held.values)
                    )
            return [logits]

        return run

    def compressed(name: str) -> Step:
        lm = model()

        def run() -> list[Tensor]:
            cache = fastprompt.PromptCache(lm, POLICIES[name](keep))
            with torch.no_grad():
                logits = lm(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
            cache.finalize()
            cache.close()
            return [logits]

        return run

    matrix = 9 * tokens**2 * (2 * kind.itemsize + 8)
    providers = {
        "plain": Provider(plain, lambda: plain()(), tokens=tokens),
        "observed": Provider(observed, lambda: observed()(), too_large(matrix, device), tokens=tokens),
    }
    for name in POLICIES:
        providers[name] = Provider(lambda n=name: compressed(n), lambda n=name: compressed(n)(), tokens=tokens)
    providers |= composed(device, providers, "lookm")
    params = {"tokens": tokens, "keep": keep, "layers": layers, "width": width, "vocab": vocab, "dtype": dtype}
    # Thirty layers of roundings to the dtype.
    bound = 8 * layers**0.5 * torch.finfo(kind).eps
    return Case("prefill_compress", providers, "plain", lambda: plain(torch.float32)(), bound, params)
