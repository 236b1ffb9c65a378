# SPDX-License-Identifier: Apache-2.0
"""The shapes of a model's layers, read off its modules: no weights, no forward."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from fastprompt.errors import UnsupportedModelError
from fastprompt.hf.outputs import FUSED, OTHERS, QUERIES, matrices
from fastprompt.hf.sites import Site, Tower, patch_values, stacks_of

#: Names of models -> transformers model type, and what differs from its default config.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "vilt": ("vilt", {}),
    "vit-b16": ("vit", {}),
    "clip-vit-b16": ("clip", {"vision_config": {"patch_size": 16}}),
    "dinov2-s": ("dinov2", {"hidden_size": 384, "num_attention_heads": 6, "image_size": 224}),
}


@dataclass(frozen=True)
class Attention:
    """One attention module: columns of its queries and of its keys, and the width of what keys are made of."""

    site: Site
    queries: int
    keys: int
    context: int

    @property
    def matrices(self) -> tuple[int, int]:
        """Numbers in the matrix that makes queries, and in those that make keys and values."""
        return self.site.width * self.queries, 2 * self.context * self.keys


@dataclass(frozen=True)
class Layer:
    """One layer.

    Args:
        stack: Number of its stack in the tower.
        weights: Numbers in its matrices, each of which is one multiply-add a token.
        attentions: Its attention modules.
    """

    stack: int
    weights: int
    attentions: tuple[Attention, ...]


def empty_model(source: str) -> PreTrainedModel:
    """A model without weights (on the meta device).

    Args:
        source: One of `PRESETS`, a transformers model type (its default config), or a config's JSON file or folder.

    Raises:
        ValueError: none of these.
    """
    path = Path(source)
    if source in PRESETS:
        kind, options = PRESETS[source]
        config = AutoConfig.for_model(kind, **options)
    elif path.exists():
        fields = json.loads((path / "config.json" if path.is_dir() else path).read_text())
        if not isinstance(fields, dict) or "model_type" not in fields:
            raise ValueError(f"model: got {source!r}, whose JSON names no model_type, expected a transformers config")
        config = AutoConfig.for_model(**fields)
    else:
        try:
            config = AutoConfig.for_model(source)
        except ValueError as error:
            raise ValueError(
                f"model: got {source!r}, expected one of {', '.join(PRESETS)}, a config.json, or a model type of "
                "transformers"
            ) from error
    with torch.device("meta"):
        return AutoModel.from_config(config)


def layers_of(model: nn.Module, tower: Tower) -> list[Layer]:
    """The layers of a tower, in order."""
    paths = list(stacks_of(model, lambda m: m in tower.attentions))
    lists: list[Any] = [model.get_submodule(path) for path in paths]
    values = patch_values(tower.module.config) if tower.kind != "text" else None
    found = []
    for index, layer in enumerate(tower.layers):
        inside = [m for m in layer.modules() if m in tower.attentions]
        attentions = tuple(_attention(index, part, layer, m, values) for part, m in enumerate(inside))
        weights = sum(cast(Tensor, m.weight).numel() for m in matrices(layer))
        stack = next(i for i, modules in enumerate(lists) if layer in list(modules))
        found.append(Layer(stack, weights, attentions))
    return found


def _attention(index: int, part: int, layer: nn.Module, module: nn.Module, values: int | None) -> Attention:
    named = dict(module.named_children())
    query = next((_sides(named[n]) for n in QUERIES if n in named), None)
    other = next((_sides(named[n]) for n in OTHERS if n in named), None)
    fused = next((_sides(named[n]) for n in FUSED if n in named), None)
    if query is None and fused is not None:  # queries as wide as the layer, and the rest for keys and values
        width = fused[0]
        query, other = (width, width), (width, (fused[1] - width) // 2)
    other = other or (fused and (fused[0], fused[1] // 2))
    if query is None or other is None:
        raise UnsupportedModelError(f"model: {type(module).__name__} has no layers for both queries and keys")
    names = ("head_dim", "attention_head_size", "key_value_proj_dim")
    dim = next((d for n in names if isinstance(d := getattr(module, n, None), int)), other[1])
    site = Site(
        index, layer, module, query[0], max(1, other[1] // dim), dim, part=part, patch_values=values
    )  # fmt: skip
    return Attention(site, query[1], other[1], other[0])


def _sides(module: Any) -> tuple[int, int]:
    """Columns of what a linear layer reads and gives."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    read, given = module.weight.shape  # transformers' Conv1D
    return int(read), int(given)


def image_tokens(tower: Tower) -> int | None:
    """Tokens of an image of the config's size in a vision tower: rows of its table of positions; None if not found."""
    config: Any = tower.module.config
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if tower.kind != "vision" or not isinstance(size, int) or not isinstance(patch, int):
        return None
    patches = (size // patch) ** 2
    inside = {id(p) for layer in tower.layers for p in layer.parameters()}
    rows = [p.shape[-2] for p in tower.module.parameters() if id(p) not in inside and p.dim() in (2, 3)]
    return next((n for n in rows if patches <= n <= patches + 16), None)
