# SPDX-License-Identifier: Apache-2.0
"""IVLP: independent prompts in both towers of a CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastprompt.nn.dual_prompt import DualPrompt, normal_prompt
from fastprompt.recipes.card import Card
from fastprompt.recipes.dassl import dassl
from fastprompt.recipes.layers import is_count
from fastprompt.recipes.words import check_context, check_depth, initial_context

if TYPE_CHECKING:
    from fastprompt.hf.clip import ClipSites

CARD = Card(
    title="MaPLe: Multi-modal Prompt Learning (its independent prompts)",
    paper="https://arxiv.org/abs/2210.03117",
    tier=1,
    family="multi-modal prompt",
    use="classifier",
    status="exact",
    trains=("context", "deep_text.*", "vision.*"),
    headline="82.15 % on base, 74.07 % on new classes, 11 data sets",
    repo="muzairkhattak/multimodal-prompt-learning",
    deviations=(
        "One learning rate a step, not an epoch; no random crops and flips.",
        "No identity setting: a vision prompt's key takes part in every softmax, whatever it holds.",
    ),
)


@dataclass(frozen=True)
class IVLP:
    """Independent vision-language prompts, the baseline of MaPLe (Khattak et al., 2023,
    https://arxiv.org/abs/2210.03117): fresh prompts before each of the first J layers of both towers.

    They enter where `MaPLe`'s do, but the vision prompts are learned by themselves.

    Args:
        n_ctx: Text prompts M of a layer.
        n_vision: Vision prompts of a layer.
        depth: Layers J, from the first, that get prompts; at most those of a tower count.
        init: Words whose first M embeddings start the text prompts of the first layer; None draws N(0, 0.02²), as all
            others are.

    Example:
        >>> from fastprompt import IVLP
        >>> IVLP()
        IVLP(n_ctx=2, n_vision=2, depth=12, init='a photo of a')
    """

    n_ctx: int = 2
    n_vision: int = 2
    depth: int = 12
    init: str | None = "a photo of a"

    position = "end"
    share = "all"

    def __post_init__(self):
        check_context(self.n_ctx, self.init, counted=True)
        check_depth(self.depth)
        if not is_count(self.n_vision):
            raise ValueError(f"n_vision: got {self.n_vision!r}, expected an integer >= 1")

    def published(self, shots: int | None = None) -> dict[str, Any]:
        """The optimisation of the released code (`dassl`), whatever the images a class: options of a `TuneConfig`."""
        return dassl(lr=3.5e-3, batch_size=4, epochs=5)

    def build(self, sites: ClipSites) -> DualPrompt:
        """Text and vision prompts of all layers."""
        context = initial_context(sites, self.n_ctx, self.init, words_may_remain=True)
        text = min(self.depth, sites.text_layers) - 1
        vision = min(self.depth, sites.vision_layers)
        return DualPrompt(
            context,
            [normal_prompt(self.n_ctx, sites.text_width).to(context.dtype) for _ in range(text)],
            vision=[normal_prompt(self.n_vision, sites.vision_width).to(context.dtype) for _ in range(vision)],
        )
