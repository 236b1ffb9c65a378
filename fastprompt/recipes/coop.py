# SPDX-License-Identifier: Apache-2.0
"""CoOp: a learned context in front of the class names of a CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastprompt.nn.dual_prompt import DualPrompt, normal_prompt
from fastprompt.recipes.card import Card
from fastprompt.recipes.dassl import dassl
from fastprompt.recipes.words import check_context, initial_context

if TYPE_CHECKING:
    from fastprompt.hf.clip import ClipSites

POSITIONS = ("end", "middle", "front")

CARD = Card(
    row=57,
    title="Learning to Prompt for Vision-Language Models",
    paper="https://arxiv.org/abs/2109.01134",
    tier=1,
    family="text prompt",
    use="classifier",
    status="exact",
    trains=("context",),
    headline="about +15 % mean accuracy at 16 shots",
    repo="KaiyangZhou/CoOp",
    identity={"n_ctx": None, "init": "a photo of a"},
    deviations=("One learning rate a step, not an epoch; no random crops and flips.",),
)


@dataclass(frozen=True)
class CoOp:
    """Context optimisation (Zhou et al., 2022, https://arxiv.org/abs/2109.01134): M learned tokens instead of the words
    of a hand-written template, shared by all classes or one context a class; the CLIP stays frozen.

    A class's text is ``[SOS] ctx_1 .. ctx_M name . [EOT]``. With the name at the end the context's states are the same
    for every class in a causal text tower, so they are computed once (identity I3).

    Args:
        n_ctx: Context tokens M: 16 as published, or those of ``init``.
        init: Words whose embeddings start the context, e.g. ``"a photo of a"``; None draws N(0, 0.02²).
        csc: One context a class; nothing but the start token is shared then.
        position: Where the name stands: ``"end"``; ``"middle"``: behind the first half of the context; ``"front"``.

    Example:
        >>> from fastprompt import CoOp
        >>> CoOp(), CoOp(init="a photo of a").n_ctx
        (CoOp(n_ctx=16, init=None, csc=False, position='end'), None)
    """

    n_ctx: int | None = None
    init: str | None = None
    csc: bool = False
    position: str = "end"

    def __post_init__(self):
        check_context(self.n_ctx, self.init)
        if self.n_ctx is None and self.init is None:
            object.__setattr__(self, "n_ctx", 16)
        if not isinstance(self.csc, bool):
            raise ValueError(f"csc: got {self.csc!r}, expected True or False")
        if self.position not in POSITIONS:
            raise ValueError(f"position: got {self.position!r}, expected one of {', '.join(map(repr, POSITIONS))}")

    @property
    def share(self) -> str:
        """What texts can share."""
        return "none" if self.csc else "all"

    def published(self, shots: int | None = None) -> dict[str, Any]:
        """The optimisation of the released code (`dassl`) for so many images a class: options of a `TuneConfig`."""
        few = 200 if shots is None else shots
        epochs = 50 if few < 2 else 100 if few < 8 else 200
        return dassl(lr=2e-3, batch_size=32, epochs=epochs)

    def build(self, sites: ClipSites) -> DualPrompt:
        """The context."""
        context = initial_context(sites, self.n_ctx, self.init)
        if self.csc:
            shape = (sites.classes, *context.shape)
            context = normal_prompt(*shape).to(context.dtype) if self.init is None else context.expand(shape).clone()
        return DualPrompt(context)
