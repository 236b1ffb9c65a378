# SPDX-License-Identifier: Apache-2.0
"""Decoding behind a long prompt, SmolLM2-135M or Qwen2.5-VL-7B shapes, random weights: sixteen tokens, one by one.

Providers: `plain` (transformers' cache), and H2O and LOOK-M with a half, a fifth and a tenth of the keys. Peak memory
is that of the timed tokens alone. Counted is what every token must read: the weights and its cache. A batch reads one
prompt, of which every sample has a copy of its own. On a GPU, ``clock=device`` leaves out what the host adds between
kernels, which is most of the time where a token is soon computed; one token then, since the device's queue of launches
holds no more.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import fastprompt
from bench.case import Case, Provider, Step, Work, composed
from bench.cases.prefill_compress import MODELS, POLICIES, decoder, sharing

STEPS = {"host": 16, "device": 1}


def build(
    device: str, tokens: int = 8192, layers: int = 0, width: int = 0, vocab: int = 0, dtype: str = "bfloat16",
    model: str = "SmolLM2-135M", batch: int = 1, clock: str = "host",
) -> Case:  # fmt: skip
    """The case; ``layers``, ``width`` and ``vocab`` 0 are those of the model, others make a quick version."""
    if clock not in STEPS:
        raise ValueError(f"clock: got {clock!r}, expected one of {', '.join(STEPS)}")
    steps = STEPS[clock]
    kind, shape = getattr(torch, dtype), MODELS[model][2].sized(layers, width, vocab)
    ids = torch.randint(shape.vocab, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    weights = lru_cache(lambda: decoder(device, kind, model, shape, tokens))

    def step(policy: Any = None) -> Step:
        lm = sharing(weights())
        cache = DynamicCache(config=lm.config) if policy is None else fastprompt.PromptCache(lm, policy)
        with torch.no_grad():
            lm(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        if policy is not None:
            cache.finalize()
        if batch > 1:
            cache.batch_repeat_interleave(batch)

        def run() -> list[Tensor]:
            token = ids[:, :1].expand(batch, -1)
            with torch.no_grad():
                for _ in range(steps):
                    token = lm(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
            return [token]

        return run

    def work(kept: int) -> Work:
        groups = shape.heads // shape.heads_kv
        layer = 2 * shape.width * (shape.width + shape.width // groups) + 3 * shape.width * shape.mlp
        read = shape.vocab * shape.width + shape.layers * layer
        states = batch * shape.layers * kept * 2 * (shape.width // groups)
        return Work(steps * 2 * (batch * read + groups * states), steps * kind.itemsize * (read + states))

    providers = {"plain": Provider(step, work=work(tokens))}
    for keep in (0.5, 0.2, 0.1):
        for name in ("h2o", "lookm"):
            build_step = lambda n=name, k=keep: step(POLICIES[n](k))  # noqa: E731
            providers[f"{name} {keep:.0%}"] = Provider(build_step, work=work(int(keep * tokens)))
    providers |= composed(device, providers, "h2o 20%")
    params = {"tokens": tokens, "steps": steps, "layers": shape.layers, "width": shape.width, "vocab": shape.vocab,
              "dtype": dtype}  # fmt: skip
    # Named where they are not what rows without them were measured with.
    params |= ({"batch": batch} if batch > 1 else {}) | ({"clock": clock} if clock != "host" else {})
    return Case("decode", providers, "plain", list, 0.0, params, device_time=clock == "device")
