# SPDX-License-Identifier: Apache-2.0
"""A whole training step (forward and backward) of deep visual prompts on a ViT, 224 px, bfloat16 autocast.

Models: DINOv2-S (patches of 14 pixels), ViT-B/16 and ViT-L/14.

Providers: `published` (prompts inserted as tokens in every layer), `kv_concat` (keys and values of prompts computed
once a step, concatenated for SDPA), `fastprompt`, and the `floor`: the same frozen model without prompts, gradients
flowing down to the embedding output. All train the same linear head.
"""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification, ViTConfig, ViTForImageClassification

import fastprompt
from bench.case import Case, Provider, Step, composed
from fastprompt.hf import attention
from fastprompt.hf.published import InsertedPrompts

#: Model -> class, config, width, heads, layers and pixels a side of a patch.
MODELS = {
    "DINOv2-S": (Dinov2ForImageClassification, Dinov2Config, 384, 6, 12, 14),
    "ViT-B": (ViTForImageClassification, ViTConfig, 768, 12, 12, 16),
    "ViT-L": (ViTForImageClassification, ViTConfig, 1024, 16, 24, 14),
}
#: Images of a step where nobody says.
BATCH = {"cpu": 16, "cuda": 64}


class Frozen:
    """A model with random weights, and training steps on images of 224 px.

    Attributes:
        width: Numbers in a token.
        batch: Images.
        layers: Layers.
    """

    def __init__(self, device: str, model: str, batch: int, layers: int):
        torch.manual_seed(0)
        self.device = device
        kind, config, self.width, heads, of_model, patch_size = MODELS[model]
        self.batch, self.layers = batch or BATCH[device], layers or of_model
        chosen = config(
            hidden_size=self.width, num_attention_heads=heads, num_hidden_layers=self.layers, num_labels=3,
            image_size=224,
            intermediate_size=4 * self.width, patch_size=patch_size,
        )  # fmt: skip
        with torch.device(device):  # a processor takes seconds to draw them
            self._model = kind(chosen).eval()
        self._pixels = torch.randn(self.batch, 3, 224, 224, device=device)
        self._labels = torch.randint(3, (self.batch,), device=device)

    def fresh(self) -> nn.Module:
        """The model."""
        return copy.deepcopy(self._model)

    def step(self, model: nn.Module, trained: list[nn.Parameter], autocast: bool = True) -> Step:
        """Forward and backward: logits, then the gradients of ``trained``."""

        def run() -> list:
            for p in trained:
                p.grad = None
            with torch.autocast(self.device, torch.bfloat16, enabled=autocast):
                out = model(pixel_values=self._pixels.to(model.dtype), labels=self._labels)
            out.loss.backward()
            return [out.logits.detach(), *(p.grad for p in trained)]

        return run

    def floor(self) -> Step:
        """Without prompts; gradients flow down to the embedding output."""
        model = self.fresh().requires_grad_(False)
        model.classifier.requires_grad_(True)
        model.base_model.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
        return self.step(model, list(model.classifier.parameters()))


def build(
    device: str, batch: int = 0, prompts: int = 100, layers: int = 0, threads: int = 0, model: str = "DINOv2-S"
) -> Case:
    """The case; ``batch`` 0 is 16 on a CPU and 64 on a GPU, ``layers`` 0 those of the model (few are quick)."""
    if threads:
        torch.set_num_threads(threads)
    frozen = Frozen(device, model, batch, layers)
    initial = [0.1 * torch.randn(prompts, frozen.width, device=device) for _ in range(frozen.layers)]

    def published(autocast: bool = True) -> Step:
        model = frozen.fresh()
        inserted = InsertedPrompts(model, {i: nn.Parameter(p.clone()) for i, p in enumerate(initial)})
        model.classifier.requires_grad_(True)
        return frozen.step(model, [*inserted.parameters(), *model.classifier.parameters()], autocast)

    def attached(autocast: bool = True) -> Step:
        model = frozen.fresh()
        handle = fastprompt.attach(model, fastprompt.VPT(length=prompts), train=("classifier",))
        with torch.no_grad():
            for p, value in zip(handle.parameters(), initial, strict=False):
                p.copy_(value)
        return frozen.step(model, list(handle.parameters()), autocast)

    def kv_concat(autocast: bool = True) -> Step:
        run = attached(autocast)

        def concatenated() -> list:
            with patch.object(attention, "prompt_attention", _kv_concat):
                return run()

        return concatenated

    providers = {
        "published": Provider(published),
        "kv_concat": Provider(kv_concat, lambda: kv_concat(autocast=False)()),
        "fastprompt": Provider(attached, lambda: attached(autocast=False)()),
        "floor": Provider(frozen.floor),
    }
    providers |= composed(device, providers)
    params = {"model": model, "batch": frozen.batch, "prompts": prompts, "layers": frozen.layers, "pixels": 224,
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
