# SPDX-License-Identifier: Apache-2.0
"""Visual prompt tuning: learned tokens before every layer (deep) or the first (shallow)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastprompt.nn.prompts import ProjectedPrompt, vpt_uniform
from fastprompt.recipes.card import Card
from fastprompt.recipes.layers import checked_layers, choose_layers, is_count

if TYPE_CHECKING:
    from fastprompt.hf.sites import Site

CARD = Card(
    title="Visual Prompt Tuning",
    paper="https://arxiv.org/abs/2203.12119",
    tier=1,
    family="visual prompt",
    use="attach",
    status="exact",
    trains=("layers.*.prompt", "layers.*.projection.*"),
    repo="KMnP/vpt",
    deviations=(
        "Prompt dropout is drawn once a step, not once a sample.",
        "No identity setting: a prompt's key takes part in every softmax, whatever it holds.",
    ),
)


@dataclass(frozen=True)
class VPT:
    """Visual prompt tuning (Jia et al., 2022, https://arxiv.org/abs/2203.12119), exact and without dead rows.

    Deep prompts are fresh tokens before each chosen layer; the tokens of the layer before are thrown away, so they
    matter only as keys and values and are computed once a step, not once a sample (identity I2). Where no fresh prompt
    follows (shallow, or after the last layer of a partial depth) the rows run as tokens until the last layer.

    In the vision tower of a multimodal model every image sees the prompts, also where images are packed in one sequence
    or cut into windows (Qwen2-VL, Qwen2.5-VL; there every layer from the first chosen on must be). Prompts have no
    position: where patches are rotated (RoPE), prompt keys are not. Of LLaVA's tower, only the layers up to the hidden
    state named by ``config.vision_feature_layer`` get prompts, since nothing reads the others.

    Args:
        length: Prompts a layer, P >= 1 (the paper's default is 5; 10 to 100 are common).
        depth: ``"deep"``: all of ``layers``; ``"shallow"``: the first layer alone.
        layers: For ``"deep"``: layer numbers from 0 (negative counts from the end); None is every layer.
        init: ``"vpt"``: uniform in ``±sqrt(6 / (patch values + width))`` as published; ``"normal"``: N(0, 0.02²) as in
            CLIP prompt learning; ``"zeros"``.
        project: Learn prompts of this width and map them to the model's by one linear layer that all layers share (the
            paper's option PROJECT); None learns them in the model's width.
        dropout: Probability of dropping a prompt element in training mode. The paper's code draws for every sample;
            here one draw serves the batch, which keeps keys and values shared.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> import fastprompt, torch
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=16)
        >>> model = ViTModel(config)
        >>> with fastprompt.attach(model, fastprompt.VPT(length=4)) as handle:
        ...     handle.num_trainable, model(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape
        (256, torch.Size([1, 5, 32]))
    """

    length: int
    depth: str = "deep"
    layers: Sequence[int] | None = None
    init: str = "vpt"
    project: int | None = None
    dropout: float = 0.0

    kind = "vision"
    projects = True
    outputs = False
    tokens = None

    def __post_init__(self):
        if not is_count(self.length):
            raise ValueError(f"length: got {self.length!r}, expected an integer >= 1 (prompts a layer)")
        if self.project is not None and not is_count(self.project):
            raise ValueError(f"project: got {self.project!r}, expected an integer >= 1 (width of a prompt) or None")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout!r}, expected a probability in [0, 1)")
        if self.depth not in ("deep", "shallow"):
            raise ValueError(f"depth: got {self.depth!r}, expected 'deep' or 'shallow'")
        if not isinstance(self.init, str) or self.init not in _INITS:
            raise ValueError(f"init: got {self.init!r}, expected one of {', '.join(map(repr, _INITS))}")
        layers = checked_layers(self.layers)
        if layers is not None and self.depth == "shallow":
            raise ValueError("layers: shallow prompts enter the first layer only; use depth='deep' with layers=...")
        object.__setattr__(self, "layers", layers)

    def chosen(self, count: int) -> list[int]:
        """The layers that get a fresh prompt, ascending, in a tower of ``count`` layers."""
        return [0] if self.depth == "shallow" else choose_layers(self.layers, count)

    def baked(self) -> VPT:
        """The recipe of the prompts after ``handle.bake()``: this one."""
        return self

    def build(self, sites: list[Site]) -> dict[int, nn.Module]:
        """One prompt module for every chosen layer."""
        chosen = self.chosen(len(sites))
        first, last = sites[chosen[0]], len(sites) - 1
        width = self.project or first.width
        device = next(first.layer.parameters()).device
        dtype = torch.promote_types(first.dtype, torch.float32)
        projection = None
        if self.project:
            projection = nn.Linear(width, first.width)
            nn.init.kaiming_normal_(projection.weight, a=0, mode="fan_out")
            projection.to(device, dtype)
        prompts: dict[int, nn.Module] = {}
        for i in chosen:
            inserted = i < last and i + 1 not in chosen
            if inserted and sites[i].packed:
                raise ValueError(
                    f"layers: got {chosen} of {last + 1}, but prompts that no next layer replaces run as tokens, which "
                    f"a tower of packed images cannot take; expected depth='deep' with all layers from {chosen[0]} on"
                )
            initial = _INITS[self.init](self.length, width, sites[i]).to(device, dtype)
            prompts[i] = ProjectedPrompt(
                initial, sites[i], inserted=inserted,
                projection=projection, owner=i == chosen[0], dropout=self.dropout,
            )  # fmt: skip
        return prompts


def _published(length: int, width: int, site: Site) -> Tensor:
    if site.patch_values is None:
        raise ValueError("init: 'vpt' needs the patch size, which the model's config lacks; use init='normal'")
    return vpt_uniform(length, width, site.patch_values)


_INITS = {
    "vpt": _published,
    "normal": lambda length, width, site: torch.randn(length, width) * 0.02,
    "zeros": lambda length, width, site: torch.zeros(length, width),
}
