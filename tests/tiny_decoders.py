# SPDX-License-Identifier: Apache-2.0
"""Tiny decoders and multimodal models, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from weakref import WeakKeyDictionary

import torch
from tiny_models import randomised
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.masking_utils import eager_mask

from fastprompt.hf.attach import Handle
from fastprompt.hf.sites import choose_tower

VOCABULARY, PAD, IMAGE = 60, 0, 50
DECODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
DECODER |= {"intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
DECODER |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TOWER |= {"image_size": 16, "patch_size": 4}
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}

DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "SmolLM2": lambda: LlamaForCausalLM(
        LlamaConfig(**DECODER | {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
                    tie_word_embeddings=True)
    ),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER | {"num_key_value_heads": 1})),
    "Qwen2, sliding window": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, **SLIDING)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=16)),
}  # fmt: skip


def qwen_vision(**kwargs) -> dict:
    return {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **kwargs}


def qwen2_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = qwen_vision(embed_dim=32, hidden_size=32, mlp_ratio=2)
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=DECODER | {"rope_parameters": rope}, vision_config=vision, **QWEN_TOKENS)
    )


def qwen2_5_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = qwen_vision(hidden_size=32, intermediate_size=48, out_hidden_size=32, window_size=16)
    vision |= {"fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=DECODER | {"rope_parameters": rope}, vision_config=vision, **QWEN_TOKENS)
    )


def qwen3_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = qwen_vision(hidden_size=32, intermediate_size=48, out_hidden_size=32, num_position_embeddings=64)
    vision |= {"deepstack_visual_indexes": [0, 1]}
    text = {k: v for k, v in DECODER.items() if not k.startswith(("bos", "eos"))} | {"head_dim": 8}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **QWEN_TOKENS)
    )


QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53}


def llava(vision) -> PreTrainedModel:
    strategy = "default" if vision.model_type == "clip_vision_model" else "full"
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**DECODER), image_token_id=IMAGE,
            vision_feature_select_strategy=strategy,
        )
    )  # fmt: skip


def idefics(model, config) -> PreTrainedModel:
    vision = {k: v for k, v in TOWER.items()}
    text = LlamaConfig(**DECODER)
    return model(config(vision_config=vision, text_config=text, scale_factor=2, image_token_id=IMAGE))


MULTIMODAL: dict[str, Callable[[], PreTrainedModel]] = {
    "LLaVA, CLIP": lambda: llava(CLIPVisionConfig(**TOWER)),
    "LLaVA, SigLIP": lambda: llava(SiglipVisionConfig(**TOWER, vision_use_head=False)),
    "Qwen2-VL": qwen2_vl,
    "Qwen2.5-VL": qwen2_5_vl,
    "Idefics3": lambda: idefics(Idefics3ForConditionalGeneration, Idefics3Config),
    "SmolVLM": lambda: idefics(SmolVLMForConditionalGeneration, SmolVLMConfig),
}
#: Whose caches are compressed, too.
CACHED = MULTIMODAL | {"Qwen3-VL": qwen3_vl}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in evaluation mode, with random weights that make attention peaked."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = randomised({**DECODERS, **CACHED}[name]()).to(dtype)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = MethodType(rms_norm, module)
    return model


def rms_norm(self, x: Tensor) -> Tensor:
    """Transformers computes it in float32 whatever the model's dtype, too coarse for a float64 comparison."""
    return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def sentences(padding: str | None = None) -> dict[str, Tensor]:
    """Three sentences of token ids, padded to one length on a side."""
    lengths = (7, 7, 7) if padding is None else (7, 4, 2)
    generator = torch.Generator().manual_seed(1)
    ids, mask = torch.full((3, 7), PAD), torch.zeros(3, 7, dtype=torch.long)
    for i, n in enumerate(lengths):
        place = slice(7 - n, 7) if padding == "left" else slice(0, n)
        ids[i, place] = torch.randint(3, 40, (n,), generator=generator)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs(name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Two left-padded conversations with an image each."""
    generator = torch.Generator().manual_seed(2)
    dtype = next(model.parameters()).dtype
    extra: dict[str, Tensor] = {}
    if name.startswith("Qwen"):
        grids = torch.tensor([[1, 4, 6], [1, 8, 4]])
        values = 3 * 2 * 4 * 4
        extra["pixel_values"] = torch.randn(int(grids.prod(-1).sum()), values, generator=generator).to(dtype)
        extra["image_grid_thw"] = grids
        counts = (grids.prod(-1) // 4).tolist()
    else:
        shape = (2, 1, 3, 16, 16) if name in ("Idefics3", "SmolVLM") else (2, 3, 16, 16)
        extra["pixel_values"] = torch.randn(shape, generator=generator).to(dtype)
        counts = [4, 4] if len(shape) == 5 else [16, 16]
    rows = []
    for i, count in enumerate(counts):
        before, after = [1, 5, 6, 7][i:], [9, 8 + i, 4]
        image = [IMAGE] * count
        if name.startswith("Qwen"):
            image = [52, *image, 53]
        rows.append([*before, *image, *after])
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(r)) + r for r in rows])
    if name.startswith("Qwen"):
        extra["mm_token_type_ids"] = (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), **extra}


def rotate_vision(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embeddings of Qwen's vision towers, which transformers computes in float32, in the dtype that it gets."""

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(-2) + torch.cat([-right, left], dim=-1) * sin.unsqueeze(-2)

    return rotate(query), rotate(key)


# The published form: learned keys in front of the rotated keys of the tokens, one copy a sample


PREFIXES: WeakKeyDictionary[nn.Module, Callable[[], tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def concatenation(module, query, key, value, attention_mask, scaling=None, is_causal=None, **kwargs):
    """Attention over ``[prefix, keys]`` of a module in `PREFIXES`, in plain matrix products, every mask written out."""
    hidden = query.new_zeros(query.shape[2], key.shape[2]) if attention_mask is None else attention_mask
    if attention_mask is None and is_causal:
        hidden = hidden.masked_fill(torch.ones_like(hidden).triu(1).bool(), -torch.inf)
    if module in PREFIXES:
        prefix_key, prefix_value = (x.to(key.dtype).expand(len(key), -1, -1, -1) for x in PREFIXES[module]())
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        hidden = torch.nn.functional.pad(hidden, (prefix_key.shape[2], 0))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = scaling * query @ key.transpose(-1, -2) + hidden
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


def concatenate(model: PreTrainedModel, tower: str, prefixes: Mapping[int, Callable]) -> PreTrainedModel:
    """A frozen model whose tower sees ``prefixes[layer]()`` as keys and values in front of its own."""
    AttentionInterface.register("tests_prefix", concatenation)
    AttentionMaskInterface.register("tests_prefix", eager_mask)
    model.requires_grad_(False)
    model.set_attn_implementation("tests_prefix")
    attentions = choose_tower(model, tower).attentions
    PREFIXES.update({attentions[i]: prefix for i, prefix in prefixes.items()})
    return model


def leaves(handle: Handle) -> dict[int, tuple[nn.Parameter, nn.Parameter]]:
    """Copies of a plain prefix's keys and values, by layer."""
    found = {n: nn.Parameter(p.detach().clone()) for n, p in handle.named_parameters()}
    return {s.index: (found[f"layers.{s.index}.key"], found[f"layers.{s.index}.value"]) for s in handle.sites}


def logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits ``[N,V]`` of the tokens that are no padding."""
    found = model(**batch).logits
    return found[batch["attention_mask"].bool()]
