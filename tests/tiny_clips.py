# SPDX-License-Identifier: Apache-2.0
"""Tiny CLIP and SigLIP models, tokenizers for them, and class names of very different lengths."""

from __future__ import annotations

import torch
from tiny_models import randomised
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

# ".." is one token, as in CLIP's own vocabulary: the text of the class "st." ends in it.
WORDS = (
    "[unk] . .. x a photo of the cat dog golden retriever st very big old red house on hill by sea itap "
    "one two three four five six seven eight drawing in"
).split()
VOCABULARY = [*WORDS, "<start>", "<end>"]
LONG = "the very big old red house on a hill by the sea"
NAMES = ("cat", "Golden Retriever", LONG, "st.", "big dog")
TEMPLATES = ("a photo of a {}.", "itap of {}", "one drawing of {} on hill.")


def clip_config(text: dict, vision: dict, projection: int) -> CLIPConfig:
    text = {"vocab_size": len(VOCABULARY), "bos_token_id": len(WORDS), "pad_token_id": len(WORDS) + 1} | text
    text |= {"intermediate_size": 2 * text["hidden_size"]}
    vision = {"image_size": 16, "patch_size": 8, "intermediate_size": 2 * vision["hidden_size"]} | vision
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


def size(width: int, layers: int, heads: int) -> dict[str, int]:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}


# Head sizes 8, 16, 24 in the text tower; towers of unequal width and depth; an end-of-text id as old configs have it.
CLIPS = {
    "16 wide, context 77": clip_config(
        size(16, 2, 2) | {"max_position_embeddings": 77, "eos_token_id": 2}, size(32, 3, 4), 16
    ),
    "32 wide, context 40": clip_config(
        size(32, 3, 2) | {"max_position_embeddings": 40, "eos_token_id": len(WORDS) + 1}, size(24, 2, 1), 20
    ),
    "48 wide, context 20": clip_config(
        size(48, 4, 2) | {"max_position_embeddings": 20, "eos_token_id": len(WORDS) + 1}, size(32, 4, 2), 48
    ),
}
SMALL, MIDDLE, WIDE = CLIPS


def clip(name: str = SMALL, dtype: torch.dtype = torch.float32, seed: int = 0) -> CLIPModel:
    """The model in evaluation mode, with weights that make attention peaked and every bias count."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(CLIPModel(CLIPConfig.from_dict(CLIPS[name].to_dict())), seed).to(dtype)


def siglip(dtype: torch.dtype = torch.float32) -> SiglipModel:
    """Bidirectional text, pooled at the last of 24 tokens; attention pooling of patches; a logit bias."""
    text = size(16, 2, 2) | {"intermediate_size": 32, "vocab_size": len(VOCABULARY), "max_position_embeddings": 24}
    text |= {"projection_size": 24, "pad_token_id": len(WORDS) + 1, "eos_token_id": len(WORDS) + 1}
    vision = size(24, 2, 3) | {"intermediate_size": 48, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomised(SiglipModel(SiglipConfig(text_config=text, vision_config=vision))).to(dtype)
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
    return model


def tokenizer(start: bool = True) -> PreTrainedTokenizerFast:
    """One token a lower-case word or run of punctuation; start (unless SigLIP's) and end tokens around the text."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[unk]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, VOCABULARY.index(word)) for word in ("<start>", "<end>")]
    template = "<start> $A <end>" if start else "$A <end>"
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    tokens = {"eos_token": "<end>", "pad_token": "<end>", "unk_token": "[unk]"}
    tokens |= {"bos_token": "<start>"} if start else {}
    return PreTrainedTokenizerFast(tokenizer_object=words, **tokens)


class BareTokenizer:
    """What the contract asks of a tokenizer and nothing else: one text a call, a plain dict of lists."""

    bos_token_id, eos_token_id = len(WORDS), len(WORDS) + 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        if not isinstance(text, str):
            raise TypeError("one text a call")
        return {"input_ids": tokenizer()(text, add_special_tokens=add_special_tokens)["input_ids"]}


def pixels(model: CLIPModel, batch: int = 3, seed: int = 1) -> Tensor:
    """Random images in the model's dtype."""
    images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return images.to(next(model.parameters()).dtype)


def values(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 3) -> dict[str, Tensor]:
    """Random leaf tensors of these shapes, large enough to matter; hidden units of CoCoOp mostly alive."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("weight"):
            x = x * shape[-1] ** -0.5
        elif name.endswith("bias"):
            x = 0.5 + 0.2 * x
        else:
            x = 0.5 * x
        found[name] = x.to(dtype).requires_grad_()
    return found
