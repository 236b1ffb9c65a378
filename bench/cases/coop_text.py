# SPDX-License-Identifier: Apache-2.0
"""The text side of a CoOp training step, CLIP ViT-B/16: features of all classes forward, the context's gradient back.

16 context tokens, names of 1 to 10 tokens, random weights, a fixed gradient at the features. Providers: `published`
(77 tokens a class), `trimmed` (cut behind the longest class), `shared` (trimmed, and the context's rows once for all
classes, their keys copied to every class: the most that plain PyTorch offers) and fastprompt, each eager and compiled.
Operations and token rows are those that a provider computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

import fastprompt
from bench.case import Case, Provider, Step, Work, composed, tolerance
from bench.measure import give_back, too_large
from bench.published_clip import LIMIT, Numbers, Texts, activation_bytes, class_names, clip_model

CHUNK = 50  # classes that the reference encodes at a time

#: What is learned, and the features of it.
Features = tuple[Tensor, Callable[[], Tensor]]


def build(
    device: str, classes: int = 100, context: int = 16, layers: int = 12, width: int = 512, vocab: int = 49408,
    dtype: str = "float32",
) -> Case:  # fmt: skip
    """The case; ``layers``, ``width`` and ``vocab`` make a quick version."""
    kind = getattr(torch, dtype)
    shape = {"width": width, "layers": layers, "vocab": vocab, "pixels": 32, "vision_layers": 1}
    clip = clip_model(device, kind, **shape)
    names = class_names(classes, vocab)
    torch.manual_seed(1)
    initial = 0.02 * torch.randn(context, width, device=device)
    grad = torch.randn(classes, width, device=device)

    def padded(length: int | None, form: str = "features") -> Features:
        learned = initial.clone().requires_grad_()
        texts = Texts(clip, names, context, length=length)
        return learned, lambda: getattr(texts, form)(learned)

    def packed() -> Features:
        classifier = fastprompt.CLIPClassifier(clip, Numbers(vocab), names, fastprompt.CoOp(n_ctx=context))
        with torch.no_grad():
            classifier.learner.context.copy_(initial)
        return classifier.learner.context, classifier.text_features

    def step(learned: Tensor, features: Callable[[], Tensor]) -> Step:
        def run() -> list[Tensor]:
            found = features()
            return [found.detach(), *torch.autograd.grad(found, learned, grad)]

        return run

    def compiled(learned: Tensor, features: Callable[[], Tensor]) -> Step:
        run = step(learned, torch.compile(features, dynamic=False))
        run()
        give_back()  # what compiling took is not the step's
        return run

    def reference() -> list[Tensor]:
        exact = clip_model(device, kind, **shape).double()
        learned = initial.double().requires_grad_()
        parts, total = [], torch.zeros_like(learned)
        for i in range(0, classes, CHUNK):
            part = Texts(exact, names[i : i + CHUNK], context, length=None).features(learned)
            total += torch.autograd.grad(part, learned, grad[i : i + CHUNK].double())[0]
            parts.append(part.detach())
        return [torch.cat(parts), total]

    def work(rows: int, pooled: int, known: int, pairs: int) -> Work:
        """Of ``rows`` in every layer, ``pooled`` of them behind the last attention, ``pairs`` that see each other.

        The first layer's keys, queries and values of ``known`` rows are at hand.
        """
        products = 24 * layers * rows - 18 * (rows - pooled) - 6 * known + 2 * classes
        weights = 12 * layers * width**2 * kind.itemsize
        return Work(2 * products * width**2 + 14 * layers * pairs * width, 2 * weights)

    def pairs(before: int, rows: int) -> int:
        return before * rows + rows * (rows + 1) // 2

    prefix = 1 + context
    own = [n - prefix for n in Texts(clip, names, context).lengths]
    longest = max(own)
    cut, shared = classes * (prefix + longest), prefix + classes * longest
    forms: dict[str, tuple[Callable[[], Features], int, int, int, int]] = {  # rows, pooled, known, pairs
        "published": (lambda: padded(LIMIT), classes * LIMIT, classes * LIMIT, 0, classes * pairs(0, LIMIT)),
        "trimmed": (lambda: padded(None), cut, cut, 0, classes * pairs(0, prefix + longest)),
        "shared": (
            lambda: padded(None, "shared_features"), shared, shared, 0,
            pairs(0, prefix) + classes * pairs(prefix, longest),
        ),
        "fastprompt": (
            packed, prefix + sum(own), classes, sum(own), pairs(0, prefix) + sum(pairs(prefix, n) for n in own),
        ),
    }  # fmt: skip
    providers = {}
    for name, (make, rows, pooled, known, seen) in forms.items():
        needed = 0 if name == "fastprompt" else activation_bytes(rows, width, layers, kind)  # it chunks classes
        why_not, counted = too_large(needed, device), work(rows, pooled, known, seen)
        for full, finish in ((name, step), (f"{name}/compiled", compiled)):
            steps = cache(lambda m=make, f=finish: f(*m()))  # compiled once, for the check and the clock
            check = lambda s=steps: s()()  # noqa: E731
            providers[full] = Provider(steps, check, why_not=why_not, work=counted, tokens=rows)
    providers |= composed(device, providers)
    params = {"classes": classes, "context": context, "layers": layers, "width": width, "vocab": vocab, "dtype": dtype}
    return Case("coop_text", providers, "published", reference, tolerance(kind), params)
