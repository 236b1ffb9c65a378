# SPDX-License-Identifier: Apache-2.0
"""CLIP prompt learning as released: every text padded to the context limit, one row a class, every row computed.

Plain PyTorch over the modules of a transformers ``CLIPModel``, differentiable in a dict of learned tensors (shapes in
`shapes`); the image loop of CoCoOp is a loop. W, Wv, D are the text, vision and projected widths, L the context limit.
Nothing here imports fastprompt: a recipe is known by its type's name and its fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# Texts


def tokenise(clip, tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids ``[C,L]`` padded with 0 behind the end-of-text token, and where that stands ``[C]``."""
    limit = clip.text_model.embeddings.position_embedding.num_embeddings
    rows = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in texts]
    assert all(len(row) <= limit and row[-1] == tokenizer.eos_token_id for row in rows)
    ids = torch.tensor([row + [0] * (limit - len(row)) for row in rows])
    return ids, torch.tensor([len(row) - 1 for row in rows])


def encode_text(clip, embedded: Tensor, end: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
    """Unit features ``[C,D]`` of embedded texts ``[C,L,W]``; ``deep[l-1]`` replaces rows 1..M before layer l."""
    tower = clip.text_model
    hidden = embedded + tower.embeddings.position_embedding.weight
    limit = hidden.shape[1]
    causal = torch.ones(limit, limit, dtype=torch.bool).tril()[None, None]
    for i, layer in enumerate(tower.encoder.layers):
        if 1 <= i <= len(deep):
            prompt = deep[i - 1]
            rows = torch.stack([prompt] * len(hidden)).to(hidden.dtype)
            hidden = torch.cat([hidden[:, :1], rows, hidden[:, 1 + len(prompt) :]], dim=1)
        hidden = layer(hidden, causal)
    hidden = tower.final_layer_norm(hidden)
    return unit(clip.text_projection(hidden[torch.arange(len(hidden)), end]))


def encode_image(clip, pixel_values: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """Unit features ``[B,D]``; ``prompts[0]`` goes behind the patches, ``prompts[l]`` in its place at layer l."""
    tower = clip.vision_model
    hidden = tower.embeddings(pixel_values)
    if prompts:
        hidden = torch.cat([hidden, torch.stack([prompts[0]] * len(hidden)).to(hidden.dtype)], dim=1)
    hidden = tower.pre_layrnorm(hidden)
    for i, layer in enumerate(tower.encoder.layers):
        if 1 <= i < len(prompts):
            rows = torch.stack([prompts[i]] * len(hidden)).to(hidden.dtype)
            hidden = torch.cat([hidden[:, : -len(prompts[i])], rows], dim=1)
        hidden = layer(hidden, None)
    return unit(clip.visual_projection(tower.post_layernorm(hidden[:, 0])))


class ClassTexts:
    """The released prompt learners' buffers: the embedded text "``words`` name." of every class."""

    def __init__(self, clip, tokenizer, classnames: Sequence[str], words: str):
        ids, self.end = tokenise(clip, tokenizer, [f"{words} {name}." for name in classnames])
        self.embedded = clip.text_model.embeddings.token_embedding(ids).detach()
        self.name_lens = [len(tokenizer(name, add_special_tokens=False)["input_ids"]) for name in classnames]

    def with_context(self, context: Tensor, position: str = "end") -> Tensor:
        """Embedded texts ``[C,L,W]`` with ``context [M,W]`` or ``[C,M,W]`` in place of the first M words."""
        context = context if context.dim() == 3 else torch.stack([context] * len(self.embedded))
        m = context.shape[1]
        half = {"end": m, "middle": m // 2, "front": 0}[position]
        texts = []
        for row, ctx, length in zip(self.embedded, context, self.name_lens, strict=True):
            start, name, rest = row[:1], row[1 + m : 1 + m + length], row[1 + m + length :]
            texts.append(torch.cat([start, ctx[:half], name, ctx[half:], rest]))
        return torch.stack(texts)


def words_of(recipe) -> str:
    """Words that stand where the context goes: those of the init, else as many placeholders as there are vectors."""
    return recipe.init if recipe.init else " ".join(["x"] * recipe.n_ctx)


# Methods


def zero_shot_features(clip, tokenizer, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """The unit mean of the unit features of the templates ``[C,D]``."""
    means = [
        encode_text(clip, clip.text_model.embeddings.token_embedding(ids), end)
        for ids, end in (tokenise(clip, tokenizer, [t.format(name) for name in classnames]) for t in templates)
    ]
    return unit(torch.stack(means).mean(dim=0))


def meta_network(tensors: Mapping[str, Tensor], features: Tensor) -> Tensor:
    hidden = F.linear(features, tensors["meta.0.weight"], tensors["meta.0.bias"]).relu()
    return F.linear(hidden, tensors["meta.2.weight"], tensors["meta.2.bias"])


def numbered(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """``tensors["name.0"]``, ``tensors["name.1"]``, ..."""
    return [tensors[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in tensors))]


def maple_vision_prompts(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The text prompt of every layer through that layer's linear map."""
    text = [tensors["context"], *numbered(tensors, "deep_text")]
    return [F.linear(x, tensors[f"couple.{i}.weight"], tensors[f"couple.{i}.bias"]) for i, x in enumerate(text)]


def features(clip, tokenizer, classnames, pixel_values, recipe, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Unit image features ``[B,D]`` and unit text features, ``[C,D]`` or, for CoCoOp, ``[B,C,D]``."""
    kind = type(recipe).__name__
    if kind == "ZeroShot":
        return encode_image(clip, pixel_values), zero_shot_features(clip, tokenizer, classnames, recipe.templates)
    texts = ClassTexts(clip, tokenizer, classnames, words_of(recipe))
    if kind == "CoOp":
        embedded = texts.with_context(tensors["context"], recipe.position)
        return encode_image(clip, pixel_values), encode_text(clip, embedded, texts.end)
    if kind == "CoCoOp":
        images = encode_image(clip, pixel_values)
        shifts = meta_network(tensors, images)
        encoded = [encode_text(clip, texts.with_context(tensors["context"] + shift), texts.end) for shift in shifts]
        return images, torch.stack(encoded)
    vision = {"MaPLe": maple_vision_prompts, "IVLP": lambda given: numbered(given, "vision")}[kind](tensors)
    embedded = texts.with_context(tensors["context"])
    text = encode_text(clip, embedded, texts.end, numbered(tensors, "deep_text"))
    return encode_image(clip, pixel_values, vision), text


def published_logits(clip, tokenizer, classnames, pixel_values, recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    """``exp(logit_scale) * unit(image) . unit(text)`` ``[B,C]``."""
    images, texts = features(clip, tokenizer, classnames, pixel_values, recipe, tensors)
    if texts.dim() == 2:
        return clip.logit_scale.exp() * images @ texts.T
    return torch.stack([clip.logit_scale.exp() * text @ image for image, text in zip(images, texts, strict=True)])


def shapes(clip, tokenizer, classnames, recipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the learned tensors, in the order of the layers."""
    kind, config = type(recipe).__name__, clip.config
    w, wv, d = config.text_config.hidden_size, config.vision_config.hidden_size, config.projection_dim
    if kind == "ZeroShot":
        return {}
    m = recipe.n_ctx or len(tokenizer(words_of(recipe), add_special_tokens=False)["input_ids"])
    if kind == "CoOp":
        return {"context": (len(classnames), m, w) if recipe.csc else (m, w)}
    found: dict[str, tuple[int, ...]] = {"context": (m, w)}
    if kind == "CoCoOp":
        found |= {"meta.0.weight": (d // 16, d), "meta.0.bias": (d // 16,)}
        return found | {"meta.2.weight": (w, d // 16), "meta.2.bias": (w,)}
    found |= {f"deep_text.{i}": (m, w) for i in range(recipe.depth - 1)}
    for i in range(recipe.depth):
        if kind == "IVLP":
            found[f"vision.{i}"] = (recipe.n_vision, wv)
        else:
            found |= {f"couple.{i}.weight": (wv, w), f"couple.{i}.bias": (wv,)}
    return found


# SigLIP: no start token, every token sees every token, padded with the tokenizer's pad token, read at the last row;
# attention pooling of the patches, which sees no prompts.


def siglip_logits(model, tokenizer, classnames, pixel_values, words: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """``exp(logit_scale) * unit(image) . unit(text) + logit_bias``, prompts at the places of CLIP's.

    ``context [M,W]`` replaces the first M words, deeper text prompts what is there; vision prompts follow the patches.
    """
    text, vision = model.text_model, model.vision_model
    limit = text.embeddings.position_embedding.num_embeddings
    rows = [tokenizer(f"{words} {name}.", add_special_tokens=True)["input_ids"] for name in classnames]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (limit - len(row)) for row in rows])
    hidden = text.embeddings.token_embedding(ids)
    prompts = [tensors["context"], *numbered(tensors, "deep_text")] if tensors else []
    if prompts:
        hidden = torch.cat([torch.stack([prompts[0]] * len(ids)), hidden[:, len(prompts[0]) :]], dim=1)
    hidden = hidden + text.embeddings.position_embedding.weight
    for i, layer in enumerate(text.encoder.layers):
        if 1 <= i < len(prompts):
            hidden = torch.cat([torch.stack([prompts[i]] * len(ids)), hidden[:, len(prompts[i]) :]], dim=1)
        hidden = layer(hidden, None)
    texts = unit(text.head(text.final_layer_norm(hidden)[:, -1]))
    prompts = maple_vision_prompts(tensors) if "couple.0.weight" in tensors else numbered(tensors, "vision")
    hidden = vision.embeddings(pixel_values)
    patches = hidden.shape[1]
    for i, layer in enumerate(vision.encoder.layers):
        if i < len(prompts):
            hidden = torch.cat([hidden[:, :patches], torch.stack([prompts[i]] * len(hidden))], dim=1)
        hidden = layer(hidden, None)
    images = unit(vision.head(vision.post_layernorm(hidden[:, :patches])))
    return model.logit_scale.exp() * images @ texts.T + model.logit_bias
