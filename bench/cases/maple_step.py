# SPDX-License-Identifier: Apache-2.0
"""A MaPLe training step, CLIP ViT-B/16, batch 4, 100 classes, both towers: loss and gradients of all learned tensors.

2 prompts in each of 9 layers. Providers: `published` (77 tokens a class, prompts concatenated as tokens in every layer
of both towers), `trimmed` (texts cut behind the longest class) and `fastprompt`. Token rows are the text tower's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import fastprompt
from bench.case import Case, Provider, Step, composed
from bench.measure import too_large
from bench.published_clip import (
    LIMIT,
    WORDS,
    Numbers,
    Texts,
    activation_bytes,
    class_names,
    clip_model,
    image_features,
)


def build(
    device: str, batch: int = 4, classes: int = 100, prompts: int = 2, depth: int = 9, layers: int = 12,
    width: int = 512, vocab: int = 49408, pixels: int = 224, dtype: str = "float32",
) -> Case:  # fmt: skip
    """The case; ``depth``, ``layers``, ``width``, ``vocab`` and ``pixels`` make a quick version."""
    chosen = getattr(torch, dtype)
    shape = {"width": width, "layers": layers, "vocab": vocab, "pixels": pixels}
    names = class_names(classes, vocab)
    frozen = " ".join(WORDS.split()[prompts:])  # words of the template that are not learned
    torch.manual_seed(1)
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    initial = {"context": 0.02 * torch.randn(prompts, width, device=device)}
    initial |= {f"deep_text.{i}": 0.02 * torch.randn(prompts, width, device=device) for i in range(depth - 1)}
    for i in range(depth):
        initial[f"couple.{i}.weight"] = torch.randn(width * 3 // 2, width, device=device) / width**0.5
        initial[f"couple.{i}.bias"] = 0.02 * torch.randn(width * 3 // 2, device=device)

    def inserted(length: int | None, kind: torch.dtype = chosen) -> Step:
        clip = clip_model(device, kind, **shape)
        texts = Texts(clip, names, prompts, frozen, length)
        exact = torch.promote_types(kind, torch.float32)  # of what is learned
        learned = {name: x.to(exact, copy=True).requires_grad_() for name, x in initial.items()}
        text = [learned["context"], *(learned[f"deep_text.{i}"] for i in range(depth - 1))]
        pixel_values, scale = images.to(kind), clip.logit_scale.exp().to(exact)

        def run() -> list[Tensor]:
            for x in learned.values():
                x.grad = None
            vision = [linear(x, learned[f"couple.{i}.weight"], learned[f"couple.{i}.bias"]) for i, x in enumerate(text)]
            logits = scale * image_features(clip, pixel_values, vision) @ texts.features(text[0], text[1:]).T
            cross_entropy(logits, labels).backward()
            return [logits.detach(), *(x.grad for x in learned.values())]

        return run

    def packed(kind: torch.dtype = chosen) -> Step:
        clip = clip_model(device, kind, **shape)
        recipe = fastprompt.MaPLe(n_ctx=prompts, depth=depth, init=WORDS)
        classifier = fastprompt.CLIPClassifier(clip, Numbers(vocab), names, recipe)
        classifier.learner.load_state_dict(initial)
        pixel_values = images.to(kind)

        def run() -> list[Tensor]:
            classifier.zero_grad()
            out = classifier(pixel_values, labels)
            out.loss.backward()
            grads = dict(classifier.learner.named_parameters())
            return [out.logits.detach(), *(grads[name].grad for name in initial)]

        return run

    clip = clip_model("cpu", torch.float32, width=64, layers=1, vocab=vocab, pixels=16)
    lengths = Texts(clip, names, prompts, frozen).lengths
    prefix = 1 + len(WORDS.split())
    rows = {
        "published": classes * LIMIT,
        "trimmed": classes * max(lengths),
        "fastprompt": prefix + sum(n - prefix for n in lengths),
    }
    makes = {
        "published": lambda *kind: inserted(LIMIT, *kind),
        "trimmed": lambda *kind: inserted(None, *kind),
        "fastprompt": packed,
    }
    providers = {}
    for name, make in makes.items():
        needed = 0 if name == "fastprompt" else activation_bytes(rows[name], width, layers, chosen)
        check = lambda m=make: m(torch.float32)()  # noqa: E731
        providers[name] = Provider(make, check, why_not=too_large(needed, device), tokens=rows[name])
    providers |= composed(device, providers)
    params = {"batch": batch, "classes": classes, "prompts": prompts, "depth": depth, "layers": layers, "width": width,
              "vocab": vocab, "pixels": pixels, "dtype": dtype}  # fmt: skip
    return Case("maple_step", providers, "published", lambda: inserted(None, torch.float64)(), 1e-4, params)
