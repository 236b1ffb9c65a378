# SPDX-License-Identifier: Apache-2.0
"""Finds every attention module of a model and the linear layer behind it, whatever function computes the attention.

An attention module is one with layers of its own that make queries, keys and values; one recorded forward shows which
linear layer reads what they became. Self- and cross-attention of a layer are two places.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastprompt.errors import UnsupportedModelError
from fastprompt.hf.recording import first_tensor
from fastprompt.hf.sites import (
    Site,
    Tower,
    evaluated,
    layers_read,
    owner_of,
    sample_image,
    sample_input,
    sample_tokens,
    stacks_of,
)

#: What layers that make queries are called; those that make keys or values; and those that make all at once.
QUERIES = ("q_proj", "query", "query_proj", "q", "q_lin", "to_q", "q_attn")
OTHERS = ("k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "k", "v", "k_lin", "v_lin", "to_k", "to_v")
FUSED = ("qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv")

#: What models that read two modalities in one call take beside ``input_ids``.
BESIDE = ("pixel_values", "visual_feats", "visual_embeds")


def attention_towers(model: nn.Module) -> list[Tower]:
    """Every set of stacks of layers with attention that one forward of a module runs, in module order.

    The kind is ``"joint"`` for what reads two modalities in one call (ViLT, LXMERT, a Q-Former). Encoder and decoder of
    one model are one tower.
    """
    names = {module: name for name, module in model.named_modules()}
    inner, config = getattr(model, "base_model", model), getattr(model, "config", None)
    both = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in _inputs(inner)
    whole = inner if both else None
    towers: dict[nn.Module, Tower] = {}
    for prefix, stack in stacks_of(model, _projections).items():
        owner, kind = (whole, "text") if whole is not None else _owner(model, prefix)
        if not kind:
            continue
        tower = towers.setdefault(owner, Tower(names[owner], kind, owner, [], []))
        read = layers_read(model, len(stack)) if kind == "vision" else len(stack)
        for layer, attentions in stack[:read]:
            tower.layers.append(layer)
            tower.attentions += attentions
    return list(towers.values())


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The nearest module above ``path`` that can be called with inputs of its own, and what it reads."""
    owner, kind = owner_of(model, path)
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        inputs = _inputs(module)
        if "query_embeds" in inputs or ("input_ids" in inputs and any(name in inputs for name in BESIDE)):
            return module, "joint"
        if module is owner:
            break
    return owner, kind


def _inputs(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _projections(module: nn.Module) -> list[nn.Module]:
    """The layers of an attention module that make its queries, keys and values; none for other modules."""
    return [m for name, m in module.named_children() if name in (*QUERIES, *OTHERS, *FUSED) and _multiplies(m)]


def _multiplies(module: nn.Module) -> bool:
    """A layer with a matrix; where that is packed, it is perhaps no tensor, or none called ``weight``."""
    weight = getattr(module, "weight", None)
    if (isinstance(weight, Tensor) and weight.dim() < 2) or isinstance(module, nn.Embedding):
        return False
    return weight is not None or hasattr(module, "out_features")


class _Place:
    """One attention module while a forward is recorded."""

    def __init__(self, index: int, part: int, layer: nn.Module, attention: nn.Module):
        self.index, self.part, self.layer, self.attention = index, part, layer, attention
        self.queries = {m for n, m in attention.named_children() if n in QUERIES}
        self.fused = {m for n, m in attention.named_children() if n in FUSED} if not self.queries else set()
        self.inside = {m for p in _projections(attention) for m in p.modules()}
        self.entered: Tensor | None = None
        self.heads = self.keys = 0
        self.output: nn.Module | None = None

    def called(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """Look at a call of a linear layer while this attention has not found the one behind it."""
        if self.entered is None:
            return
        width = self.entered.shape[-1]
        if module in self.queries:
            self.heads = y.shape[-1]
        elif module in self.fused:
            # How much of it is queries, it does not say.
            self.heads = self.keys = width
        elif module in self.inside:
            self.keys = y.shape[-1]
        elif self.heads and (x.shape[-1], y.shape) == (self.heads, self.entered.shape):
            self.output = module

    def problem(self) -> str | None:
        """What the recording did not show."""
        if self.output is not None:
            return None
        where = f"layer {self.index} ({type(self.attention).__name__})"
        if self.entered is None:
            return f"{where}: it did not run in one forward of the tower"
        width = self.entered.shape[-1]
        return f"{where}: no linear layer from {self.heads} to {width} columns follows its attention"

    def site(self) -> Site:
        """The place as recipes see it."""
        x = self.entered
        if x is None:
            raise RuntimeError("entered: nothing was recorded")
        names = ("head_dim", "attention_head_size", "key_value_proj_dim")
        dim = next((d for n in names if isinstance(d := getattr(self.attention, n, None), int)), self.keys)
        return Site(
            self.index, self.layer, self.attention, x.shape[-1], max(1, self.keys // dim), dim,
            output=self.output, packed=x.dim() == 2, part=self.part,
        )  # fmt: skip


def find_outputs(tower: Tower) -> list[Site]:
    """Run the tower once on a small input and find the linear layer behind every attention module.

    Raises:
        UnsupportedModelError: lists the attention modules that have none, or that did not run.
    """
    places = _places(tower)
    by_attention = {p.attention: p for p in places}
    open_places: list[_Place] = []

    def enter(module, args, kwargs):
        place = by_attention[module]
        if place.output is None:
            place.entered = first_tensor(args, kwargs)
            open_places.append(place)

    def called(module, args, kwargs, output):
        x = first_tensor(args, kwargs)
        if open_places and x is not None and isinstance(output, Tensor):
            open_places[-1].called(module, x, output)
            if open_places[-1].output is not None:
                open_places.pop()

    def leave(module, args, output):
        open_places.clear()

    hooks = [p.attention.register_forward_pre_hook(enter, with_kwargs=True) for p in places]
    for layer in tower.layers:
        hooks += [m.register_forward_hook(called, with_kwargs=True) for m in matrices(layer)]
        hooks.append(layer.register_forward_hook(leave))
    try:
        with evaluated(tower.module), torch.random.fork_rng([]):
            tower.module(**_samples(tower, places))
    finally:
        for hook in hooks:
            hook.remove()
    problems = [text for p in places if (text := p.problem())]
    if problems:
        raise UnsupportedModelError(
            f"model: {type(tower.module).__name__} cannot hold prompts behind its attention; missing:\n  "
            + "\n  ".join(problems)
        )
    return [p.site() for p in places]


def _places(tower: Tower) -> list[_Place]:
    attentions = set(tower.attentions)
    found = []
    for index, layer in enumerate(tower.layers):
        inside = [m for m in layer.modules() if m in attentions]
        found += [_Place(index, part, layer, m) for part, m in enumerate(inside)]
    return found


def matrices(layer: nn.Module) -> Iterator[nn.Module]:
    """The modules of a layer with a matrix, without what such a module is made of."""
    covered: set[nn.Module] = set()
    for module in layer.modules():
        if module not in covered and _multiplies(module):
            covered.update(module.modules())
            yield module


def _samples(tower: Tower, places: list[_Place]) -> dict[str, Tensor]:
    """The smallest input that runs every attention module of the tower."""
    module, names = tower.module, _inputs(tower.module)
    config: Any = module.config
    weight = next(p for p in module.parameters() if p.is_floating_point())
    width = getattr(config, "hidden_size", None) or config.d_model

    def rows(count: int, size: int) -> Tensor:
        drawn = torch.randn(1, count, size, generator=torch.Generator().manual_seed(0))
        return drawn.to(weight.device, weight.dtype)

    given: dict[str, Tensor] = {}
    if tower.kind != "joint":
        given = sample_input(tower)
    else:
        if "input_ids" in names and "query_embeds" not in names:
            given["input_ids"] = sample_tokens(weight.device)
        if "pixel_values" in names:
            given["pixel_values"] = sample_image(config, weight)
        if "visual_feats" in names:
            given["visual_feats"], given["visual_pos"] = rows(3, config.visual_feat_dim), rows(3, config.visual_pos_dim)
        if "visual_embeds" in names:
            given["visual_embeds"] = rows(3, config.visual_embedding_dim)
        if "query_embeds" in names:
            given["query_embeds"] = rows(3, width)
    if "decoder_input_ids" in names:
        given["decoder_input_ids"] = sample_tokens(weight.device)
    elif "encoder_hidden_states" in names and any(p.part for p in places):
        # Beside its self-attention, a layer attends to what another model gave.
        given["encoder_hidden_states"] = rows(3, getattr(config, "encoder_hidden_size", None) or width)
    unknown = [name for name in given if name not in names]
    if unknown:
        raise UnsupportedModelError(
            f"model: {type(module).__name__} reads {names[0]}, of which no sample is known here, and no {unknown[0]}"
        )
    return given
