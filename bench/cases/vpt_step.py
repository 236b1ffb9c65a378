# SPDX-License-Identifier: Apache-2.0
"""A whole training step (forward and backward) of deep visual prompts on DINOv2-S, 224 px, bfloat16 autocast.

Providers: `published` (prompts inserted as tokens in every layer), `kv_concat` (keys and values of prompts computed
once a step, concatenated for SDPA), `fastprompt`, and the `floor`: the same frozen model without prompts, gradients
flowing down to the embedding output. All train the same linear head.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification

import fastprompt
from bench.case import Case, Provider, Step
from fastprompt.hf import attention
from fastprompt.hf.published import InsertedPrompts


def build(device: str, batch: int = 16, prompts: int = 100, layers: int = 12, threads: int = 0) -> Case:
    """The case; ``layers`` < 12 gives a quick version."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_attention_heads=6, num_hidden_layers=layers, patch_size=14, image_size=224, num_labels=3
    )
    base = Dinov2ForImageClassification(config).to(device).eval()
    pixels = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(3, (batch,), device=device)
    initial = [0.1 * torch.randn(prompts, 384, device=device) for _ in range(layers)]

    def fresh() -> nn.Module:
        model = Dinov2ForImageClassification(config).to(device).eval()
        model.load_state_dict(base.state_dict())
        return model

    def step(model: nn.Module, trained: list[nn.Parameter], autocast: bool = True) -> Step:
        def run() -> list:
            for p in trained:
                p.grad = None
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                out = model(pixel_values=pixels, labels=labels)
            out.loss.backward()
            return [out.logits.detach(), *(p.grad for p in trained)]

        return run

    def published(autocast: bool = True):
        model = fresh()
        inserted = InsertedPrompts(model, {i: nn.Parameter(p.clone()) for i, p in enumerate(initial)})
        model.classifier.requires_grad_(True)
        return step(model, [*inserted.parameters(), *model.classifier.parameters()], autocast)

    def attached(autocast: bool = True):
        model = fresh()
        handle = fastprompt.attach(model, fastprompt.VPT(length=prompts), train=("classifier",))
        with torch.no_grad():
            for p, value in zip(handle.parameters(), initial, strict=False):
                p.copy_(value)
        return step(model, list(handle.parameters()), autocast)

    def kv_concat(autocast: bool = True):
        run = attached(autocast)

        def concatenated() -> list:
            with patch.object(attention, "prompt_attention", _kv_concat):
                return run()

        return concatenated

    def floor():
        model = fresh()
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        model.dinov2.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
        return step(model, list(model.classifier.parameters()))

    providers = {
        "published": Provider(published),
        "kv_concat": Provider(kv_concat, lambda: kv_concat(autocast=False)()),
        "fastprompt": Provider(attached, lambda: attached(autocast=False)()),
        "floor": Provider(floor),
    }
    params = {"model": "DINOv2-S", "batch": batch, "prompts": prompts, "layers": layers, "pixels": 224,
              "dtype": "bfloat16 autocast"}  # fmt: skip
    return Case("vpt_step", providers, "published", lambda: published(autocast=False)(), 1e-4, params)


def _kv_concat(query, key, value, prompt_key, prompt_value, *, attn_mask, is_causal, scale, **_):
    """The fair baseline: K_p and V_p once a step, concatenated to every sample's keys."""
    keys, values = (
        torch.cat([prompt.expand(len(key), -1, -1, -1), instance], dim=2)
        for prompt, instance in ((prompt_key, key), (prompt_value, value))
    )
    # The log-sum-exp is for compressing caches; there is none.
    return nn.functional.scaled_dot_product_attention(query, keys, values, scale=scale), None
