# SPDX-License-Identifier: Apache-2.0
"""Decoupled prompt learning written out: prompts concatenated to every sample, every score computed, four softmaxes.

Plain PyTorch over the modules of a transformers ``CLIPModel``; nothing here imports fastprompt. A branch that is off
leaves the other the whole weight; a row that sees no row of the other kind reads its own, whatever is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from clip_oracles import ClassTexts, numbered, unit
from torch import Tensor, nn


def attend(attention, rows: Tensor, prompts: Tensor, seen: Tensor, lam: Mapping, branches: Sequence[str]) -> Tensor:
    """Self-attention ``[B,T,W]`` of normed rows; ``prompts [T]`` says which are, ``seen [T,T]`` which keys a row sees.

    ``lam`` has λ of instance rows ("x") and of prompt rows ("p"): a number, a tensor, or None for the joint softmax.
    """
    q, k, v = (
        project(rows).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = q @ k.transpose(-1, -2) * attention.scale
    out = []
    for i, prompt in enumerate(prompts):
        me, you = ("p", "x") if prompt else ("x", "p")
        other = seen[i] & (prompts != prompt)
        own = seen[i] & (prompts == prompt) & (me + me in branches or not other.any())
        other &= me + you in branches
        kinds = [own, other]
        weights = [1 - lam[me], lam[me]] if lam[me] is not None else [None, None]
        if lam[me] is None:
            kinds, weights = [own | other], [1.0]
        elif not own.any() or not other.any():
            weights = [float(own.any()), float(other.any())]
        total = torch.zeros_like(q[:, :, i])
        for kind, weight in zip(kinds, weights, strict=True):
            if kind.any():
                read = torch.einsum("bhk,bhkd->bhd", scores[:, :, i, kind].softmax(-1), v[:, :, kind])
                total = total + (weight.reshape(-1, 1) if isinstance(weight, Tensor) else weight) * read
        out.append(total)
    return attention.out_proj(torch.stack(out, dim=1).flatten(2))


def run(layer, hidden: Tensor, prompts: Tensor, seen: Tensor, lam: Mapping, branches: Sequence[str]) -> Tensor:
    hidden = hidden + attend(layer.self_attn, layer.layer_norm1(hidden), prompts, seen, lam, branches)
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def lam_of(recipe, tensors: Mapping[str, Tensor], tower: str, layer: int) -> dict[str, Any]:
    """λ of a layer; rows that nothing reads have none of their own, and may have any."""
    if recipe.lam == "exact":
        return {"x": None, "p": None}
    if recipe.lam == "constant":
        return {"x": recipe.lam_value, "p": recipe.lam_value}
    names = {"x": f"{tower}_split.{layer}.instance", "p": f"{tower}_split.{layer}.prompt"}
    return {kind: tensors[name].sigmoid() if name in tensors else 0.7 for kind, name in names.items()}


def generated(tensors: Mapping[str, Tensor], names: Tensor) -> Tensor:
    hidden = F.linear(names, tensors["generator.0.weight"], tensors["generator.0.bias"]).relu()
    return F.linear(hidden, tensors["generator.2.weight"], tensors["generator.2.bias"])


def shifted(tower, tokenizer, classnames, recipe, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The text prompts ``[C,M,W]`` of every layer."""
    layers = [x.expand(len(classnames), -1, -1) for x in (tensors["context"], *numbered(tensors, "deep_text"))]
    if not recipe.conditioned:
        return layers
    ids = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in classnames]
    names = torch.stack([tower.embeddings.token_embedding.weight[i].mean(0) for i in ids])
    return [x + generated(tensors, names)[:, None] for x in layers]


def text_features(clip, tokenizer, classnames, recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    """Unit features ``[C,D]`` of texts padded to the context limit."""
    tower = clip.text_model
    words = recipe.init or " ".join(["x"] * recipe.n_ctx)
    texts = ClassTexts(clip, tokenizer, classnames, words)
    layers = shifted(tower, tokenizer, classnames, recipe, tensors)
    hidden = texts.with_context(layers[0]) + tower.embeddings.position_embedding.weight
    limit, m = hidden.shape[1], recipe.n_ctx
    seen = torch.ones(limit, limit, dtype=torch.bool).tril()
    prompts = torch.zeros(limit, dtype=torch.bool)
    prompts[1 : 1 + m] = True
    for i, layer in enumerate(tower.encoder.layers):
        if 1 <= i < len(layers):
            hidden = torch.cat([hidden[:, :1], layers[i], hidden[:, 1 + m :]], dim=1)
        hidden = run(layer, hidden, prompts, seen, lam_of(recipe, tensors, "text", i), recipe.branches)
    hidden = tower.final_layer_norm(hidden)
    return unit(clip.text_projection(hidden[torch.arange(len(hidden)), texts.end]))


def image_features(clip, pixel_values: Tensor, recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    """Unit features ``[B,D]``."""
    tower = clip.vision_model
    hidden = through_images(tower, tower.embeddings(pixel_values), tower.pre_layrnorm, recipe, tensors)
    return unit(clip.visual_projection(tower.post_layernorm(hidden[:, 0])))


def through_images(tower, hidden: Tensor, entry, recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    """Patches ``[B,N,C]`` through all layers, prompts behind them."""
    given, patches = numbered(tensors, "vision"), hidden.shape[1]
    hidden = entry(torch.cat([hidden, given[0].expand(len(hidden), -1, -1)], dim=1))
    prompts = torch.arange(hidden.shape[1]) >= patches
    seen = torch.ones(len(prompts), len(prompts), dtype=torch.bool)
    for i, layer in enumerate(tower.encoder.layers):
        if 1 <= i < len(given):
            hidden = torch.cat([hidden[:, :patches], given[i].expand(len(hidden), -1, -1)], dim=1)
        hidden = run(layer, hidden, prompts, seen, lam_of(recipe, tensors, "vision", i), recipe.branches)
    return hidden[:, :patches]


def decoupled_logits(clip, tokenizer, classnames, pixel_values, recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    """``exp(logit_scale) * unit(image) . unit(text)`` ``[B,C]``."""
    texts = text_features(clip, tokenizer, classnames, recipe, tensors)
    return clip.logit_scale.exp() * image_features(clip, pixel_values, recipe, tensors) @ texts.T


def siglip_logits(model, tokenizer, classnames, pixel_values, recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    """``exp(logit_scale) * unit(image) . unit(text) + logit_bias``: every token sees every token, no start token."""
    text, vision = model.text_model, model.vision_model
    limit, m = text.embeddings.position_embedding.num_embeddings, recipe.n_ctx
    rows = [tokenizer(f"{recipe.init} {name}.", add_special_tokens=True)["input_ids"] for name in classnames]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (limit - len(row)) for row in rows])
    layers = shifted(text, tokenizer, classnames, recipe, tensors)
    hidden = text.embeddings.token_embedding(ids)
    hidden = torch.cat([layers[0], hidden[:, m:]], dim=1) + text.embeddings.position_embedding.weight
    prompts, seen = torch.arange(limit) < m, torch.ones(limit, limit, dtype=torch.bool)
    for i, layer in enumerate(text.encoder.layers):
        if 1 <= i < len(layers):
            hidden = torch.cat([layers[i], hidden[:, m:]], dim=1)
        hidden = run(layer, hidden, prompts, seen, lam_of(recipe, tensors, "text", i), recipe.branches)
    texts = unit(text.head(text.final_layer_norm(hidden)[:, -1]))
    hidden = through_images(vision, vision.embeddings(pixel_values), nn.Identity(), recipe, tensors)
    images = unit(vision.head(vision.post_layernorm(hidden)))
    return model.logit_scale.exp() * images @ texts.T + model.logit_bias
