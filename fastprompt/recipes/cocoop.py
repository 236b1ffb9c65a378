# SPDX-License-Identifier: Apache-2.0
"""CoCoOp: a context that every image shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fastprompt.nn.dual_prompt import DualPrompt
from fastprompt.recipes.card import Card
from fastprompt.recipes.dassl import dassl
from fastprompt.recipes.words import check_context, initial_context

if TYPE_CHECKING:
    from fastprompt.hf.clip import ClipSites

CARD = Card(
    title="Conditional Prompt Learning for Vision-Language Models",
    paper="https://arxiv.org/abs/2203.05557",
    tier=1,
    family="text prompt",
    use="classifier",
    status="exact",
    trains=("context", "meta.*"),
    headline="71.69 % on new classes, 75.83 % harmonic mean over 11 data sets",
    repo="KaiyangZhou/CoOp",
    deviations=(
        "One learning rate a step, not an epoch; no random crops and flips.",
        "No identity setting: as released, the network that shifts the context does not start at zero.",
    ),
)


@dataclass(frozen=True)
class CoCoOp:
    """Conditional context optimisation (Zhou et al., 2022, https://arxiv.org/abs/2203.05557): the context of image x is
    ``ctx_m + h(x)``, with a two-layer network h on its unit feature.

    Every image has texts of its own for all classes; they are encoded in one packed pass for all images of a batch,
    with one shared prefix an image.

    Args:
        n_ctx: Context tokens M; None is those of ``init``, or 16 without.
        init: Words whose embeddings start the context; None draws N(0, 0.02²).

    Example:
        >>> from fastprompt import CoCoOp
        >>> CoCoOp()
        CoCoOp(n_ctx=None, init='a photo of a')
    """

    n_ctx: int | None = None
    init: str | None = "a photo of a"

    position = "end"
    share = "image"

    def __post_init__(self):
        check_context(self.n_ctx, self.init)

    def published(self, shots: int | None = None) -> dict[str, Any]:
        """The optimisation of the released code (`dassl`), whatever the images a class: options of a `TuneConfig`."""
        return dassl(lr=2e-3, batch_size=1, epochs=10)

    def build(self, sites: ClipSites) -> DualPrompt:
        """The context, and h: width D to D/16 to W."""
        context = initial_context(sites, self.n_ctx, self.init)
        hidden = max(sites.feature_width // 16, 1)
        meta = nn.Sequential(nn.Linear(sites.feature_width, hidden), nn.ReLU(), nn.Linear(hidden, sites.text_width))
        return DualPrompt(context, meta=meta.to(context.dtype))
