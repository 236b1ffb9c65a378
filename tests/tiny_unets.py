# SPDX-License-Identifier: Apache-2.0
"""Tiny UNets with the blocks of Stable Diffusion 1.5 and SDXL, IP-Adapters for them, and a whole pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TEXT, IMAGE = 24, 20
SMALL = {"sample_size": 16, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": TEXT}
SD15 = SMALL | {
    "block_out_channels": (16, 32), "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SDXL = SMALL | {
    "block_out_channels": (16, 32), "attention_head_dim": (2, 4), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}  # fmt: skip
UNETS = {"sd15": SD15, "sdxl": SDXL}


def tiny_unet(kind: str = "sd15", dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    return UNet2DConditionModel(**UNETS[kind]).to(dtype).eval()


def adapter_state(unet: UNet2DConditionModel, kind: str = "plain", tokens: int = 5, seed: int = 1) -> dict:
    """The contents of a public IP-Adapter file: 4 tokens of one embedding, or (``plus``) a resampler's."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: 0.3 * torch.randn(*shape, generator=generator)  # noqa: E731
    weights = {}
    cross = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    modules = dict(unet.named_modules())
    for i, name in enumerate(cross):
        to_k = modules[name.removesuffix(".processor")].to_k
        for which in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * i + 1}.{which}.weight"] = randn(*to_k.weight.shape)
    if kind == "plain":
        projection = {"proj.weight": randn(4 * TEXT, IMAGE), "proj.bias": randn(4 * TEXT)}
        projection |= {"norm.weight": 1 + randn(TEXT), "norm.bias": randn(TEXT)}
    else:
        inner = 64
        projection = {
            "latents": randn(1, tokens, inner), "proj_in.weight": randn(inner, IMAGE), "proj_in.bias": randn(inner),
            "proj_out.weight": randn(TEXT, inner), "proj_out.bias": randn(TEXT),
            "norm_out.weight": 1 + randn(TEXT), "norm_out.bias": randn(TEXT),
        }  # fmt: skip
        for i in range(4):
            for n in (1, 2):
                projection |= {
                    f"layers.{i}.0.norm{n}.weight": 1 + randn(inner),
                    f"layers.{i}.0.norm{n}.bias": randn(inner),
                }
            projection |= {
                f"layers.{i}.0.to_q.weight": randn(inner, inner),
                f"layers.{i}.0.to_kv.weight": randn(2 * inner, inner),
            }
            projection |= {f"layers.{i}.0.to_out.weight": randn(inner, inner)}
            projection |= {f"layers.{i}.1.0.weight": 1 + randn(inner), f"layers.{i}.1.0.bias": randn(inner)}
            projection |= {
                f"layers.{i}.1.1.weight": randn(4 * inner, inner),
                f"layers.{i}.1.3.weight": randn(inner, 4 * inner),
            }
    return {"image_proj": projection, "ip_adapter": weights}


def published(kind: str, *adapters: str, dtype: torch.dtype = torch.float64) -> UNet2DConditionModel:
    """A UNet with published adapters, as diffusers loads them."""
    unet = tiny_unet(kind, dtype)
    states = [adapter_state(unet, which, seed=i) for i, which in enumerate(adapters)]
    unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)
    return unet


def noise(unet: UNet2DConditionModel, given: dict) -> Tensor:
    return unet(**given).sample


def inputs(unet: UNet2DConditionModel, batch: int = 2, images: tuple[int, ...] = (1,), plus: bool = False) -> dict:
    """What a UNet takes at a step: text tokens and, for every adapter, embeddings of its images."""
    dtype = unet.dtype
    added: dict = {}
    if unet.config.addition_embed_type:
        added = {"text_embeds": torch.randn(batch, 24, dtype=dtype), "time_ids": torch.randn(batch, 6, dtype=dtype)}
    shape = (7, IMAGE) if plus else (IMAGE,)
    if images:
        added["image_embeds"] = [torch.randn(batch, n, *shape, dtype=dtype) for n in images]
    return {
        "sample": torch.randn(batch, 4, 16, 16, dtype=dtype), "timestep": torch.tensor(300),
        "encoder_hidden_states": torch.randn(batch, 7, TEXT, dtype=dtype), "added_cond_kwargs": added,
    }  # fmt: skip


@contextmanager
def linear_calls() -> Iterator[Counter]:
    """How often each ``nn.Linear`` runs, without a hook on it."""
    calls: Counter = Counter()
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        calls[self] += 1
        return forward(self, x)

    with patch.object(nn.Linear, "forward", counted):
        yield calls


def tiny_pipeline(kind: str = "sd15") -> DiffusionPipeline:
    """Stable Diffusion in small: text and vision towers, VAE, UNet and tokenizer."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    width = TEXT if kind == "sd15" else TEXT // 2  # SDXL joins what its two text towers say
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=1,
        projection_dim=24,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        projection_dim=IMAGE,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=32,
    )  # fmt: skip
    parts = {
        "vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer, "unet": tiny_unet(kind),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    }  # fmt: skip
    if kind == "sd15":
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    else:
        second = {"text_encoder_2": CLIPTextModelWithProjection(text), "tokenizer_2": tokenizer}
        pipeline = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
