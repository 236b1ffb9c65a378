# SPDX-License-Identifier: Apache-2.0
"""A whole training step (forward and backward) of approximated prompt tuning on DINOv2-S or ViT-B, 224 px, bfloat16
autocast.

Providers: `eager` (the released module behind every output projection), `fastprompt`, and the `floor`: the same frozen
model without prompts, gradients flowing down to the embedding output. For scale, as many deep visual prompts, which
compute something else: `vpt/published` (inserted as tokens in every layer) and `vpt/fastprompt`. All train the same
linear head.
"""

from __future__ import annotations

import torch

import fastprompt
from bench.case import Case, Provider, Step, composed
from bench.cases import vpt_step
from bench.cases.vpt_step import Frozen
from fastprompt.hf.published import ReadPrompts


def build(
    device: str, batch: int = 0, prompts: int = 100, layers: int = 0, threads: int = 0, model: str = "DINOv2-S"
) -> Case:
    """The case; ``batch`` 0 is 16 on a CPU and 64 on a GPU, ``layers`` 0 those of the model (few are quick)."""
    if threads:
        torch.set_num_threads(threads)
    frozen = Frozen(device, model, batch, layers)

    def attached(exact: bool = False, eager: bool = False) -> Step:
        # In float64, since ReLU has a kink: a score that rounds to its other side has another gradient.
        model = frozen.fresh().to(torch.float64 if exact else torch.float32)
        torch.manual_seed(1)
        handle = fastprompt.attach(model, fastprompt.APT(length=prompts), train=("classifier",))
        with torch.no_grad():
            for name, p in handle.named_parameters():
                if name.endswith(".up"):  # as if it had learned a little: zeros give gradients of zero to compare
                    p.normal_(std=0.002)
        if not eager:
            return frozen.step(model, list(handle.parameters()), not exact)
        released = ReadPrompts(handle)
        model.classifier.requires_grad_(True)
        return frozen.step(model, [*released.parameters(), *model.classifier.parameters()], not exact)

    deep = vpt_step.build(device, batch, prompts, layers, threads, model).providers
    providers = {
        "eager": Provider(lambda: attached(eager=True)),
        "fastprompt": Provider(attached, lambda: attached(exact=True)()),
        "floor": Provider(frozen.floor),
        "vpt/published": Provider(deep["published"].build),
        "vpt/fastprompt": Provider(deep["fastprompt"].build),
    }
    providers |= composed(device, providers)
    params = {"model": model, "batch": frozen.batch, "prompts": prompts, "layers": frozen.layers, "pixels": 224,
              "dtype": "bfloat16 autocast"}  # fmt: skip
    return Case("apt_step", providers, "floor", lambda: attached(exact=True, eager=True)(), 1e-10, params)
