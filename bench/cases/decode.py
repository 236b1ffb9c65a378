# SPDX-License-Identifier: Apache-2.0
"""Decoding behind a long prompt, SmolLM2-135M shapes, random weights: sixteen tokens, one after the other.

Providers: `plain` (transformers' cache), and H2O and LOOK-M with a half, a fifth and a tenth of the keys. Peak memory
is that of the timed tokens alone. Counted is what every token must read: the weights and its cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

import fastprompt
from bench.case import Case, Provider, Step, Work, composed
from bench.cases.prefill_compress import POLICIES, decoder

STEPS = 16


def build(
    device: str, tokens: int = 8192, layers: int = 30, width: int = 576, vocab: int = 49152, dtype: str = "bfloat16"
) -> Case:
    """The case; ``layers``, ``width`` and ``vocab`` make a quick version."""
    kind = getattr(torch, dtype)
    ids = torch.randint(vocab, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)

    def step(policy: object = None) -> Step:
        lm = decoder(device, kind, layers, width, vocab, tokens)
        cache = DynamicCache(config=lm.config) if policy is None else fastprompt.PromptCache(lm, policy)
        with torch.no_grad():
            lm(input_ids=ids, past_key_values=cache, logits_to_keep=1)

        def run() -> list[Tensor]:
            token = ids[:, :1]
            with torch.no_grad():
                for _ in range(STEPS):
                    token = lm(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
            return [token]

        return run

    def work(kept: int) -> Work:
        weights = vocab * width + layers * (2 * width * (width + width // 3) + 3 * width * (width * 8 // 3))
        states = layers * kept * 2 * (width // 3)
        return Work(STEPS * 2 * (weights + 3 * states), STEPS * kind.itemsize * (weights + states))

    providers = {"plain": Provider(step, work=work(tokens))}
    for keep in (0.5, 0.2, 0.1):
        for name in ("h2o", "lookm"):
            build_step = lambda n=name, k=keep: step(POLICIES[n](k))  # noqa: E731
            providers[f"{name} {keep:.0%}"] = Provider(build_step, work=work(int(keep * tokens)))
    providers |= composed(device, providers, "h2o 20%")
    params = {"tokens": tokens, "steps": STEPS, "layers": layers, "width": width, "vocab": vocab, "dtype": dtype}
    return Case("decode", providers, "plain", list, 0.0, params)
