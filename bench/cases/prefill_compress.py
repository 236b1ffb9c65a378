# SPDX-License-Identifier: Apache-2.0
"""Prefill of a decoder and compression of its cache to a fifth, SmolLM2-135M or Qwen2.5-VL-7B shapes, random weights.

Providers: `plain` (no compression), `observed` (H2O's scores as libraries take them today: every layer builds its
attention matrix, sums its columns, and drops keys by plain PyTorch), and fastprompt's policies. Prefill is exact in all
of them: the logits of the last token are compared with those of the plain model in float32, or, of Qwen2.5-VL-7B, whose
float32 form would not fit beside it, in the same dtype. All providers share one copy of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
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


class Shape(NamedTuple):
    """Of a decoder; ``mlp`` is the width of its MLP, ``tied`` whether the head is the embedding."""

    width: int
    layers: int
    heads: int
    heads_kv: int
    mlp: int
    vocab: int
    tied: bool
    rope_theta: float

    def sized(self, layers: int, width: int, vocab: int) -> Shape:
        """The same with these sizes, where they are not 0."""
        width = width or self.width
        return self._replace(
            layers=layers or self.layers, width=width, vocab=vocab or self.vocab, mlp=self.mlp * width // self.width
        )


#: Model -> class, config and shape. The decoder of Qwen2.5-VL is that of Qwen2, with other positions for images.
MODELS: dict[str, tuple[type[PreTrainedModel], type, Shape]] = {
    "SmolLM2-135M": (LlamaForCausalLM, LlamaConfig, Shape(576, 30, 9, 3, 1536, 49152, True, 1e5)),
    "Qwen2.5-VL-7B": (Qwen2ForCausalLM, Qwen2Config, Shape(3584, 28, 28, 4, 18944, 152064, False, 1e6)),
}


def decoder(device: str, kind: torch.dtype, model: str, shape: Shape, tokens: int) -> Any:
    """The model, the same every time."""
    torch.manual_seed(0)
    of, config, _ = MODELS[model]
    chosen = config(
        hidden_size=shape.width, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads_kv, intermediate_size=shape.mlp, vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied, max_position_embeddings=2 * tokens,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )  # fmt: skip
    with torch.device(device):
        return of(chosen).to(device, kind).eval()


def sharing(lm: Any) -> Any:
    """Another model with the same weights in the same memory."""
    return copy.deepcopy(lm, {id(p): p for p in lm.parameters()})


def build(
    device: str, tokens: int = 4096, keep: float = 0.2, layers: int = 0, width: int = 0, vocab: int = 0,
    dtype: str = "bfloat16", model: str = "SmolLM2-135M",
) -> Case:  # fmt: skip
    """The case; ``layers``, ``width`` and ``vocab`` 0 are those of the model, others make a quick version."""
    kind, shape = getattr(torch, dtype), MODELS[model][2].sized(layers, width, vocab)
    ids = torch.randint(shape.vocab, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    weights = lru_cache(lambda: decoder(device, kind, model, shape, tokens))

    def fresh(chosen: torch.dtype = kind) -> Any:
        return sharing(weights()) if chosen == kind else decoder(device, chosen, model, shape, tokens)

    def plain(chosen: torch.dtype = kind) -> Step:
        lm = fresh(chosen)

        def run() -> list[Tensor]:
            with torch.no_grad():
                return [lm(input_ids=ids, past_key_values=DynamicCache(config=lm.config), logits_to_keep=1).logits]

        return run

    def observed() -> Step:
        AttentionInterface.register(OBSERVED, observed_attention)
        AttentionMaskInterface.register(OBSERVED, sdpa_mask)
        lm = fresh()
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
        lm = fresh()

        def run() -> list[Tensor]:
            cache = fastprompt.PromptCache(lm, POLICIES[name](keep))
            with torch.no_grad():
                logits = lm(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
            cache.finalize()
            cache.close()
            return [logits]

        return run

    matrix = shape.heads * tokens**2 * (2 * kind.itemsize + 8)
    providers = {
        "plain": Provider(plain, lambda: plain()(), tokens=tokens),
        "observed": Provider(observed, lambda: observed()(), too_large(matrix, device), tokens=tokens),
    }
    for name in POLICIES:
        providers[name] = Provider(lambda n=name: compressed(n), lambda n=name: compressed(n)(), tokens=tokens)
    providers |= composed(device, providers, "lookm")
    params = {"tokens": tokens, "keep": keep, "layers": shape.layers, "width": shape.width, "vocab": shape.vocab,
              "dtype": dtype}  # fmt: skip
    # As many layers of roundings to the dtype.
    bound = 8 * shape.layers**0.5 * torch.finfo(kind).eps
    exact = torch.float32 if model == "SmolLM2-135M" else kind
    return Case("prefill_compress", providers, "plain", lambda: plain(exact)(), bound, params)
