# SPDX-License-Identifier: Apache-2.0
"""Approximated prompt tuning: prompts read after attention, outside its softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastprompt.nn.diffused import DiffusedPrompt
from fastprompt.ops.diffuse_prompts import ACTIVATIONS, WEIGHTS
from fastprompt.recipes.card import Card
from fastprompt.recipes.layers import checked_layers, choose_layers, is_count

if TYPE_CHECKING:
    from fastprompt.hf.sites import Site

CARD = Card(
    title="Approximated Prompt Tuning for Vision-Language Pre-trained Models",
    paper="https://arxiv.org/abs/2306.15706",
    tier=1,
    family="approximated attention",
    use="attach",
    status="approximation",
    row=2,
    repo="DoubtedSteam/APT",
    headline="+7.01 % accuracy and -82.30 % added computation against prompt tuning, on METER",
    trains=("layers.*.prompt", "layers.*.down", "layers.*.up", "layers.*.log_scale", "layers.*.gate"),
    identity={"zero_init": True},
    deviations=(
        "ReLU, the row maximum as a weight without gradient and exp(s) are those of the released code; the paper's "
        "own equations were not to be had.",
        "The released code is for ViLT and METER alone; other models get its ViLT form (s learned; METER's is "
        "scale_trainable=False).",
        "The code's dropout of activations is left out.",
        "zero_init and its gate are not the method's: as released, outputs change when prompts are attached.",
        "`fastprompt count` gives -82.29 % from shapes (243 tokens fitted), and -82.30 % of the rounded numbers.",
        "+7.01 % is no difference of two cells of the released table.",
    ),
)


@dataclass(frozen=True)
class APT:
    """Approximated Prompt Tuning (Wu et al., 2023, https://arxiv.org/abs/2306.15706): after the output projection of
    every attention module, tokens add what they read from P prompts, which never become tokens or keys of the softmax.

    An approximation of deep prompts, and a method of its own: by default, as released, outputs already change when it
    is attached. The formula is that of the released code for ViLT: keys are prompts plus a rank-r map of them, ReLU
    instead of softmax, and each token's largest activation as a weight without gradient. ``handle.bake()`` folds the
    map into the keys, for inference.

    For any attention with layers of its own for queries, keys and values and one linear layer behind it, self or cross,
    whatever computes it: ViT, CLIP, ViLT (``tower="joint"`` where a model has more than it), BERT-like encoders,
    encoder-decoders, Q-Formers, LLMs with their caches. A layer with several gets prompts for each.

    Args:
        length: Prompts an attention module, P >= 1 (the paper: 200).
        rank: Rank of the key map, at most the model's width.
        activation: ``"relu"``, or ``"softmax"`` over prompts.
        weight: ``"rowmax"``, or ``"none"``.
        layers: Layer numbers from 0, on from stack to stack (encoder, then decoder), that get prompts; negative counts
            from the end; None is every layer.
        scale_trainable: Learn the scale of every layer's output (ViLT's code does, METER's does not).
        zero_init: Start as the frozen model, bit for bit: values are prompts times a learned scalar a module, the gate,
            which starts at 0; in the first step only it and s have gradients that are not 0.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> import fastprompt, torch
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=16)
        >>> model = ViTModel(config)
        >>> with fastprompt.attach(model, fastprompt.APT(length=5)) as handle:
        ...     handle.num_trainable, model(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape
        (834, torch.Size([1, 5, 32]))
    """

    length: int
    rank: int = 4
    activation: str = "relu"
    weight: str = "rowmax"
    layers: Sequence[int] | None = None
    scale_trainable: bool = True
    zero_init: bool = False

    kind = None
    projects = False
    outputs = True
    tokens = None

    def __post_init__(self):
        for name in ("length", "rank"):
            if not is_count(getattr(self, name)):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected an integer >= 1")
        for name, allowed in (("activation", ACTIVATIONS), ("weight", WEIGHTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(repr, allowed))}"
                )
        for name in ("scale_trainable", "zero_init"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        object.__setattr__(self, "layers", checked_layers(self.layers))

    def baked(self) -> APT:
        """The recipe of the prompts after ``handle.bake()``: this one."""
        return self

    def build(self, sites: list[Site]) -> dict[int, nn.Module]:
        """One prompt module for every chosen layer."""
        chosen = choose_layers(self.layers, sites[-1].index + 1)
        prompts: dict[int, nn.Module] = {}
        for place, site in enumerate(sites):
            if site.index not in chosen:
                continue
            if self.rank > site.width:
                raise ValueError(
                    f"rank: got {self.rank}, expected at most {site.width}, the width of layer {site.index}"
                )
            prompts[place] = DiffusedPrompt(
                self.length, site.width, self.rank, activation=self.activation, weight=self.weight,
                scale_trainable=self.scale_trainable, gated=self.zero_init,
            ).to(next(site.layer.parameters()).device, torch.promote_types(site.dtype, torch.float32))  # fmt: skip
        return prompts
