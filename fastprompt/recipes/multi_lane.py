# SPDX-License-Identifier: Apache-2.0
"""MULTI-LANE: one pathway a task through a frozen vision transformer, over summaries of its patch tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastprompt.nn.lanes import Lane
from fastprompt.recipes.card import Card
from fastprompt.recipes.layers import checked_layers, choose_layers, is_count

if TYPE_CHECKING:
    from fastprompt.hf.sites import Site

#: What becomes of summaries between layers.
REPLACE = ("residual", "reset", "none")


@dataclass(frozen=True)
class MultiLane:
    """MULTI-LANE (De Min et al., 2024, https://arxiv.org/abs/2405.15633), a recipe of `fastprompt.TaskPathways`.

    At every layer, a task's S selectors pool the normed tokens of the frozen stream into S summaries,
    ``u = softmax(LN(s) x^T / sqrt(C)) x``, and the task's class token attends to itself, to its summaries and, in the
    first layers, to K prompt keys and values. Summaries are then dropped; the class token alone goes on.

    Args:
        summaries: Selectors S of a task (published: 20).
        length: Prompts K of a prompted layer and task (published: 20).
        layers: Layers with prompts, from 0 (published: the first 5 of 12); None is every layer.
        replace: What selects in the next layer. ``"residual"``, as in the released code, where the residual is added
            after drop and replace: selectors take LN(s) for their attention's output and pass the rest of the layer.
            ``"reset"``, as the paper has it: the same selectors in every layer. ``"none"``, without drop and replace
            (our reading): summaries are drawn before the first layer and run on as tokens.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> import fastprompt, torch
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=16)
        >>> recipe = fastprompt.MultiLane(summaries=3, length=4, layers=[0])
        >>> pathways = fastprompt.TaskPathways(ViTModel(config), recipe)
        >>> pathways.grow(["cat", "dog"])
        >>> pathways.grow(["bird"])
        >>> pathways(torch.randn(5, 3, 32, 32)).logits.shape
        torch.Size([5, 3])
    """

    summaries: int = 20
    length: int = 20
    layers: Sequence[int] | None = (0, 1, 2, 3, 4)
    replace: str = "residual"

    def __post_init__(self):
        for name in ("summaries", "length"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected an integer >= 1")
        if self.replace not in REPLACE:
            raise ValueError(f"replace: got {self.replace!r}, expected one of {', '.join(map(repr, REPLACE))}")
        object.__setattr__(self, "layers", checked_layers(self.layers))

    def chosen(self, count: int) -> list[int]:
        """The layers with prompts, ascending, in a tower of ``count`` layers."""
        return choose_layers(self.layers, count)

    def lane(self, sites: list[Site], classes: int) -> Lane:
        """What a task with ``classes`` classes learns."""
        site = sites[0]
        return Lane(
            summaries=self.summaries, length=self.length, layers=len(self.chosen(len(sites))), width=site.width,
            heads=site.heads, head_dim=site.head_dim, classes=classes,
        )  # fmt: skip


CARD = Card(
    title="Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning",
    paper="https://arxiv.org/abs/2405.15633",
    tier=1,
    family="pathways",
    use="pathways",
    status="exact",
    trains=("lanes.*",),
    row=59,
    repo="tdemin16/multi-lane",
    deviations=(
        "No identity setting: a class token that attends to summaries is another feature, whatever a lane holds.",
        "Rows of summaries, which are dropped, do not run: the same numbers without their queries and their MLP.",
        "Prompts start with a standard deviation of (length * width) ** -0.5: the released orthogonal_ runs over all "
        "tasks at once, (tasks * length * width) ** -0.5, and not over unit vectors a prompt.",
        "The loop trains one label an image, with cross entropy over the current task's classes; multi-label data, "
        "label smoothing and the task-selection head are not reproduced.",
        "replace='none' is our reading of the ablation without drop and replace.",
    ),
)
