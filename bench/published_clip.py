# SPDX-License-Identifier: Apache-2.0
"""CLIP prompt learning as published, over the layers of transformers, and the CLIP that cases run on.

Every class is a row of 77 tokens (or, trimmed, of as many as the longest class needs), context included. W, Wv and D
are the text, vision and projected widths, M the context tokens, C the classes. Nothing here is fastprompt's.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import CLIPConfig, CLIPModel

LIMIT = 77  # CLIP's context
WORDS = "320 1125 539 320"  # "a photo of a"
STOP = 269  # "."


class Numbers:
    """A tokenizer whose words are token ids in digits, and ``"."``."""

    def __init__(self, vocab: int):
        self.bos_token_id, self.eos_token_id = vocab - 2, vocab - 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """``{"input_ids": [...]}``."""
        ids = [STOP if word == "." else int(word) for word in re.findall(r"\d+|\.", text)]
        return {"input_ids": [self.bos_token_id, *ids, self.eos_token_id] if add_special_tokens else ids}


def class_names(count: int, vocab: int) -> list[str]:
    """Names of 1 to 10 tokens, 4 on average, as class names have; full stop and end token make it 3 to 12."""
    draw = torch.Generator().manual_seed(0)
    lengths = (1 + torch.poisson(torch.full((count,), 3.0), generator=draw)).clamp(max=10).int().tolist()
    return [" ".join(map(str, torch.randint(300, vocab - 2, (n,), generator=draw).tolist())) for n in lengths]


def clip_model(
    device: str, dtype: torch.dtype, *, width: int = 512, layers: int = 12, vocab: int = 49408, pixels: int = 224,
    vision_layers: int | None = None,
) -> CLIPModel:  # fmt: skip
    """A frozen CLIP ViT-B/16 (by default) with random weights of trained scales; the same in every call."""
    layers_of_vision = layers if vision_layers is None else vision_layers
    return copy.deepcopy(_drawn(device, width, layers, vocab, pixels, layers_of_vision)).to(dtype)


@lru_cache(maxsize=1)  # a case asks for one again and again, and a processor takes seconds to draw it
def _drawn(device: str, width: int, layers: int, vocab: int, pixels: int, vision_layers: int) -> CLIPModel:
    torch.manual_seed(0)
    vision = width * 3 // 2
    ends = {"bos_token_id": vocab - 2, "eos_token_id": vocab - 1}
    config = CLIPConfig(
        projection_dim=width,
        text_config={
            "hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width,
            "num_hidden_layers": layers, "vocab_size": vocab, **ends,
        },
        vision_config={
            "hidden_size": vision, "num_attention_heads": vision // 64, "intermediate_size": 4 * vision,
            "num_hidden_layers": vision_layers, "patch_size": 16, "image_size": pixels,
        },
    )  # fmt: skip
    with torch.device(device):
        model = CLIPModel(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.normal_(1, 0.1)
        if getattr(module, "bias", None) is not None:
            module.bias.normal_(0, 0.1)
    model.logit_scale.fill_(math.log(100))
    return model


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / x.norm(dim=-1, keepdim=True)


class Texts:
    """The texts ``[SOS][M context tokens][frozen words][name . EOT]`` of all classes, padded.

    Args:
        clip: The model.
        names: Class names, for `Numbers`.
        slots: M.
        words: Frozen words behind the context, such as MaPLe's "of a".
        length: Tokens of a row; None is those of the longest class.
    """

    def __init__(self, clip: CLIPModel, names: Sequence[str], slots: int, words: str = "", length: int | None = LIMIT):
        self.clip, self.slots = clip, slots
        embedding = clip.text_model.embeddings.token_embedding
        tokenizer = Numbers(embedding.num_embeddings)
        rows = [tokenizer(f"{'0 ' * slots}{words} {name}.")["input_ids"] for name in names]
        self.lengths = [len(row) for row in rows]
        self.length = length or max(self.lengths)
        device = embedding.weight.device
        ids = torch.tensor([row + [0] * (self.length - len(row)) for row in rows], device=device)
        self.embedded = embedding(ids)
        self.positions = clip.text_model.embeddings.position_embedding.weight[: self.length]
        self.ends = torch.tensor(self.lengths, device=device) - 1
        self.mask = causal_lower_right(self.length - 1 - slots, self.length)  # a class's own rows over all

    def features(self, context: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """Unit features ``[C,D]`` with ``context [M,W]``; ``deep[l-1]`` replaces rows 1..M before layer l."""
        hidden = self._put(self.embedded, context) + self.positions
        for i, layer in enumerate(self.clip.text_model.encoder.layers):
            if 1 <= i <= len(deep):
                hidden = self._put(hidden, deep[i - 1])
            hidden = layer(hidden, None, is_causal=True)
        return self._pool(hidden[torch.arange(len(hidden), device=hidden.device), self.ends])

    def shared_features(self, context: Tensor) -> Tensor:
        """`features`, start token and context computed once, their keys and values copied in front of every class's."""
        before = 1 + self.slots
        rows = torch.cat([self.embedded[0, :1], context.to(self.embedded.dtype)]) + self.positions[:before]
        own = self.embedded[:, before:] + self.positions[before:]
        classes, tokens, width = own.shape
        hidden = torch.cat([rows, own.flatten(0, 1)])  # of the prefix once, and of all classes
        for layer in self.clip.text_model.encoder.layers:
            attention = layer.self_attn
            normed = layer.layer_norm1(hidden)
            projected = [p(normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            prefix = [x[:before].view(1, before, attention.num_heads, -1).transpose(1, 2) for x in projected]
            suffix = [x[before:].view(classes, tokens, attention.num_heads, -1).transpose(1, 2) for x in projected]
            key, value = (
                torch.cat([p.expand(classes, -1, -1, -1), s], 2) for p, s in zip(prefix[1:], suffix[1:], strict=True)
            )
            mixed = (
                scaled_dot_product_attention(*prefix, is_causal=True),
                scaled_dot_product_attention(suffix[0], key, value, self.mask),
            )
            hidden = hidden + attention.out_proj(torch.cat([x.transpose(1, 2).reshape(-1, width) for x in mixed]))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        first = tokens * torch.arange(classes, device=hidden.device)
        return self._pool(hidden[first + self.ends])

    def _put(self, rows: Tensor, prompt: Tensor) -> Tensor:
        expanded = prompt.to(rows.dtype).expand(len(rows), -1, -1)
        return torch.cat([rows[:, :1], expanded, rows[:, 1 + self.slots :]], dim=1)

    def _pool(self, rows: Tensor) -> Tensor:
        return unit(self.clip.text_projection(self.clip.text_model.final_layer_norm(rows)))


def image_features(clip: CLIPModel, pixels: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """Unit features ``[B,D]``; ``prompts[0] [Mv,Wv]`` goes behind the patches, ``prompts[l]`` takes its place at l."""
    tower = clip.vision_model
    hidden = tower.embeddings(pixels)
    if prompts:
        hidden = torch.cat([hidden, prompts[0].to(hidden.dtype).expand(len(hidden), -1, -1)], dim=1)
    hidden = tower.pre_layrnorm(hidden)
    for i, layer in enumerate(tower.encoder.layers):
        if 1 <= i < len(prompts):
            rows = prompts[i].to(hidden.dtype).expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, : -rows.shape[1]], rows], dim=1)
        hidden = layer(hidden, None)
    return unit(clip.visual_projection(tower.post_layernorm(hidden[:, 0])))


def meta_network(learned: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """CoCoOp's shift ``[W]`` of every context token, of a unit image feature ``[D]``."""
    hidden = linear(features, learned["meta.0.weight"], learned["meta.0.bias"]).relu()
    return linear(hidden, learned["meta.2.weight"], learned["meta.2.bias"])


def activation_bytes(rows: int, width: int, layers: int, dtype: torch.dtype) -> int:
    """What autograd keeps of a text tower's rows: 14 W a row and layer.

    Inputs of both norms, queries, keys, values and attention's output (6 W), QuickGELU's input and sigmoid (8 W);
    products with frozen weights keep no inputs.
    """
    return rows * layers * 14 * width * dtype.itemsize
