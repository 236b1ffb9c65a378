# SPDX-License-Identifier: Apache-2.0
"""MaPLe: prompts in both towers of a CLIP, the vision prompts computed of the text prompts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fastprompt.nn.dual_prompt import DualPrompt, normal_prompt
from fastprompt.recipes.card import Card
from fastprompt.recipes.dassl import dassl
from fastprompt.recipes.words import check_context, check_depth, initial_context

if TYPE_CHECKING:
    from fastprompt.hf.clip import ClipSites

CARD = Card(
    row=8,
    title="MaPLe: Multi-modal Prompt Learning",
    paper="https://arxiv.org/abs/2210.03117",
    tier=1,
    family="multi-modal prompt",
    use="classifier",
    status="exact",
    trains=("context", "deep_text.*", "couple.*"),
    headline="+3.45 % on new classes, +2.72 % harmonic mean against CoCoOp, 11 data sets",
    repo="muzairkhattak/multimodal-prompt-learning",
    deviations=(
        "One learning rate a step, not an epoch; no random crops and flips.",
        "No identity setting: a vision prompt's key takes part in every softmax, whatever it holds.",
    ),
)


@dataclass(frozen=True)
class MaPLe:
    """Multi-modal prompt learning (Khattak et al., 2023, https://arxiv.org/abs/2210.03117): fresh text prompts before
    each of the first J layers, and vision prompts that one linear layer a depth computes of them.

    Text prompts are the first M slots behind the start token, so they sit in the prefix that all classes share; words
    of ``init`` beyond them stay as they are ("of a" with M = 2). Vision prompts enter before ``pre_layrnorm``; those
    that the next layer replaces are keys and values only (identity I2), and behind layer J the last run as tokens.

    Args:
        n_ctx: Prompts M of a layer.
        depth: Layers J, from the first, that get prompts; at most those of the shallower tower count.
        init: Words whose first M embeddings start the prompts of the first layer; None draws N(0, 0.02²), as the deeper
            ones always are.

    Example:
        >>> from fastprompt import MaPLe
        >>> MaPLe()
        MaPLe(n_ctx=2, depth=9, init='a photo of a')
    """

    n_ctx: int = 2
    depth: int = 9
    init: str | None = "a photo of a"

    position = "end"
    share = "all"

    def __post_init__(self):
        check_context(self.n_ctx, self.init, counted=True)
        check_depth(self.depth)

    def published(self, shots: int | None = None) -> dict[str, Any]:
        """The optimisation of the released code (`dassl`), whatever the images a class: options of a `TuneConfig`."""
        return dassl(lr=3.5e-3, batch_size=4, epochs=5)

    def build(self, sites: ClipSites) -> DualPrompt:
        """Text prompts of all layers, and the layers that compute the vision prompts; the deeper ones start alike."""
        context = initial_context(sites, self.n_ctx, self.init, words_may_remain=True)
        depth = min(self.depth, sites.text_layers, sites.vision_layers)
        deep = [normal_prompt(self.n_ctx, sites.text_width).to(context.dtype) for _ in range(depth - 1)]
        first, deeper = (nn.Linear(sites.text_width, sites.vision_width).to(context.dtype) for _ in range(2))
        return DualPrompt(context, deep, couple=[first, *(copy.deepcopy(deeper) for _ in range(depth - 1))])
