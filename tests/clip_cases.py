# SPDX-License-Identifier: Apache-2.0
"""Classifiers on tiny CLIP models, one step of them, and the same step as published."""

from __future__ import annotations

import torch
from clip_oracles import published_logits, shapes
from tiny_clips import NAMES, TEMPLATES, clip, pixels, tokenizer, values
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastprompt import IVLP, CLIPClassifier, CoCoOp, CoOp, MaPLe, ZeroShot

RECIPES = {
    "CoOp": CoOp(n_ctx=4),
    "CoOp words": CoOp(init="itap of the"),
    "CoOp middle": CoOp(n_ctx=4, position="middle"),
    "CoOp middle, odd": CoOp(n_ctx=3, position="middle"),
    "CoOp front": CoOp(n_ctx=4, position="front"),
    "CSC": CoOp(n_ctx=4, csc=True),
    "CSC middle": CoOp(n_ctx=3, csc=True, position="middle"),
    "CSC front": CoOp(n_ctx=2, csc=True, position="front"),
    "CoCoOp": CoCoOp(),
    "CoCoOp, no words": CoCoOp(n_ctx=3, init=None),
    "MaPLe": MaPLe(depth=2),
    "MaPLe shallow": MaPLe(depth=1),
    "MaPLe, all words": MaPLe(n_ctx=4, depth=2),
    "IVLP": IVLP(n_vision=3, depth=2),
    "IVLP shallow": IVLP(n_ctx=1, n_vision=1, depth=1),
}
FROZEN = {"one template": ZeroShot(TEMPLATES[:1]), "templates": ZeroShot(TEMPLATES)}
# One of each kind.
KINDS = ("CoOp", "CoOp middle", "CSC front", "CoCoOp", "MaPLe", "IVLP")


def labels(batch: int, classes: int) -> Tensor:
    return (torch.arange(batch) * 3 + classes - 1) % classes


def build(name: str, recipe, dtype=torch.float32, names=NAMES, words=None, **options) -> CLIPClassifier:
    """A classifier whose learned tensors have values of their own, in training mode."""
    model = clip(name, dtype)
    clf = CLIPClassifier(model, words or tokenizer(), names, recipe, **options).train()
    wanted = values(shapes(model, tokenizer(), names, recipe), torch.promote_types(dtype, torch.float32))
    found = {key: p.shape for key, p in clf.learner.named_parameters()}
    assert found == {key: x.shape for key, x in wanted.items()}
    clf.learner.load_state_dict(wanted)
    return clf


def step(clf, images: Tensor | None = None) -> dict[str, Tensor]:
    """Logits, loss, and the gradient of every learned tensor by its name."""
    clf.zero_grad()
    images = pixels(clf.clip) if images is None else images
    out = clf(images, labels=labels(len(images), len(clf.classnames)))
    out.loss.backward()
    found = {"logits": out.logits.detach(), "loss": out.loss.detach()}
    return found | {key: p.grad for key, p in clf.learner.named_parameters()}


def usual(name: str, recipe, draws: int = 4) -> dict[str, Tensor]:
    """The published form in float32 whose results are the furthest from the truth, of some with other roundings.

    One form's rounding error is a draw; a product that rounds elsewhere computes for weights that are a rounding away.
    """
    truth = published(name, recipe, torch.float64)
    found = [published(name, recipe, nudged=seed) for seed in range(draws)]

    def worst(results: dict[str, Tensor]) -> float:
        return max(float((x.double() - truth[k]).abs().max() / truth[k].abs().max()) for k, x in results.items())

    return max(found, key=worst)


def published(
    name: str, recipe, dtype=torch.float32, names=NAMES, images: Tensor | None = None, nudged: int = 0
) -> dict[str, Tensor]:
    """The same as `step`, from the oracle; ``nudged`` seeds weights that are each up to a rounding off, 0 is none."""
    model = clip(name, dtype).requires_grad_(False)
    if nudged:
        generator = torch.Generator().manual_seed(nudged)
        for p in model.parameters():
            p.mul_(1 + torch.finfo(dtype).eps * (torch.rand(p.shape, generator=generator, dtype=dtype) - 0.5))
    tensors = values(shapes(model, tokenizer(), names, recipe), torch.promote_types(dtype, torch.float32))
    images = pixels(model) if images is None else images
    logits = published_logits(model, tokenizer(), names, images, recipe, tensors)
    loss = cross_entropy(logits, labels(len(images), len(names)))
    found = {"logits": logits.detach(), "loss": loss.detach()}
    if not tensors:
        return found
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return found | dict(zip(tensors, gradients, strict=True))
