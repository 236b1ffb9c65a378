# SPDX-License-Identifier: Apache-2.0
"""A CoCoOp training step, CLIP ViT-B/16, 100 classes, 4 context tokens: loss and gradients of the context and the net.

Providers: `published` (a Python loop over images; each encodes all classes at 77 tokens and goes backward at once, as
the released code does with batch 1, so that the memory is that of one image), `trimmed` (the same, cut behind the
longest class) and `fastprompt` (all images and classes in packed passes). The image tower is frozen and its features
are the same in all: with ``tower`` 0 they are given, with 1 every step computes them. On a CPU `published` is not run
with more than 8 images: each is a step of its own, seconds long, whatever their number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fastprompt
from bench.case import Case, Provider, Step, composed
from bench.measure import too_large
from bench.published_clip import (
    LIMIT,
    Numbers,
    Texts,
    activation_bytes,
    class_names,
    clip_model,
    image_features,
    meta_network,
)

#: Images of the longest published loop that is timed on a CPU.
LOOP = 8


def build(
    device: str, batch: int = 8, classes: int = 100, context: int = 4, layers: int = 12, width: int = 512,
    vocab: int = 49408, pixels: int = 224, tower: int = 0, dtype: str = "float32",
) -> Case:  # fmt: skip
    """The case; ``layers``, ``width``, ``vocab`` and ``pixels`` make a quick version."""
    chosen = getattr(torch, dtype)
    shape = {"width": width, "layers": layers, "vocab": vocab, "pixels": pixels}
    names = class_names(classes, vocab)
    torch.manual_seed(1)
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    hidden = width // 16
    initial = {
        "context": 0.02 * torch.randn(context, width, device=device),
        "meta.0.weight": torch.randn(hidden, width, device=device) / width**0.5,
        "meta.0.bias": 0.1 * torch.randn(hidden, device=device),
        "meta.2.weight": 0.02 * torch.randn(width, hidden, device=device) / hidden**0.5,
        "meta.2.bias": 0.002 * torch.randn(width, device=device),
    }

    def looped(length: int | None, kind: torch.dtype = chosen) -> Step:
        clip = clip_model(device, kind, **shape)
        texts = Texts(clip, names, context, length=length)
        exact = torch.promote_types(kind, torch.float32)  # of what is learned
        learned = {name: x.to(exact, copy=True).requires_grad_() for name, x in initial.items()}
        pixel_values = images.to(kind)
        given = None if tower else image_features(clip, pixel_values)
        scale = clip.logit_scale.exp().to(exact)

        def run() -> list[Tensor]:
            total = torch.zeros((), dtype=exact, device=device)
            for x in learned.values():
                x.grad = None
            for i in range(batch):
                feature = image_features(clip, pixel_values[i : i + 1])[0] if given is None else given[i]
                text = texts.features(learned["context"] + meta_network(learned, feature))
                loss = cross_entropy(scale * text @ feature, labels[i]) / batch
                loss.backward()
                total += loss.detach()
            return [total, *(x.grad for x in learned.values())]

        return run

    def packed(kind: torch.dtype = chosen) -> Step:
        clip = clip_model(device, kind, **shape)
        recipe = fastprompt.CoCoOp(n_ctx=context, init=None)
        classifier = fastprompt.CLIPClassifier(clip, Numbers(vocab), names, recipe, cache_images=not tower)
        classifier.learner.load_state_dict(initial)
        pixel_values = images.to(kind)
        classifier.image_features(pixel_values)  # kept, without the tower

        def run() -> list[Tensor]:
            classifier.zero_grad()
            loss = classifier(pixel_values, labels).loss
            loss.backward()
            grads = dict(classifier.learner.named_parameters())
            return [loss.detach(), *(grads[name].grad for name in initial)]

        return run

    clip = clip_model("cpu", torch.float32, width=64, layers=1, vocab=vocab, pixels=16)
    lengths = Texts(clip, names, context).lengths
    rows = {
        "published": batch * classes * LIMIT,
        "trimmed": batch * classes * max(lengths),
        "fastprompt": batch * (1 + context + sum(n - 1 - context for n in lengths)),
    }
    makes = {
        "published": lambda *kind: looped(LIMIT, *kind),
        "trimmed": lambda *kind: looped(None, *kind),
        "fastprompt": packed,
    }
    providers = {}
    for name, make in makes.items():
        needed = 0 if name == "fastprompt" else activation_bytes(rows[name] // batch, width, layers, chosen)
        check = lambda m=make: m(torch.float32)()  # noqa: E731
        why_not = too_large(needed, device)
        if name == "published" and device == "cpu" and batch > LOOP:
            why_not = f"{batch} steps of one image each, as with batch {LOOP}"
        providers[name] = Provider(make, check, why_not=why_not, tokens=rows[name])
    providers |= composed(device, providers)
    params = {"batch": batch, "classes": classes, "context": context, "layers": layers, "width": width, "vocab": vocab,
              "pixels": pixels, "tower": tower, "dtype": dtype}  # fmt: skip
    return Case("cocoop_step", providers, "published", lambda: looped(None, torch.float64)(), 1e-4, params)
