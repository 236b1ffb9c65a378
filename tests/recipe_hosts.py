# SPDX-License-Identifier: Apache-2.0
"""A tiny base model for every use of a recipe, and the recipe on it: what the contract of all recipes runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import cache_cases
import tiny_clips
import tiny_decoders
import tiny_models
import torch
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import fastprompt
from fastprompt.cache import SnapKV


@dataclass
class Held:
    """A recipe on a model: what it gives, what it learns, and the way back."""

    model: nn.Module
    outputs: Callable[[Any], Tensor]
    loss: Callable[[Any], Tensor] | None = None
    parameters: Callable[[], dict[str, nn.Parameter]] = dict
    save: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Host:
    """A base model and how its recipes are used.

    Args:
        build: The base model in a dtype.
        batch: Inputs of so many samples in that dtype.
        base: What the base gives, beside which an identity setting is held.
        hold: The recipe on a model, taken off at the end.
        load: What was saved, on a model, likewise.
        exact: An identity setting gives the same bits.
    """

    build: Callable[[torch.dtype], nn.Module]
    batch: Callable[[int, torch.dtype], Any]
    base: Callable[[nn.Module, Any], Tensor]
    hold: Callable[[nn.Module, Any], Any]
    load: Callable[[nn.Module, Any], Any] | None = None
    exact: bool = True


# Heads of 16, the smallest that the kernels take.
WIDE = {"hidden_size": 32, "num_attention_heads": 2}
VISION = WIDE | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}


def labels(batch: int) -> Tensor:
    return torch.arange(batch) % 3


def vit(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_models.randomised(
            ViTForImageClassification(ViTConfig(**VISION, num_hidden_layers=3, num_labels=3))
        ).to(dtype)


def images(batch: int, dtype: torch.dtype, size: int = 32) -> dict[str, Tensor]:
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {"pixel_values": pixels, "labels": labels(batch)}


def _attached(handle: fastprompt.hf.attach.Handle) -> Held:
    model = handle.model
    return Held(
        model, lambda x: model(**x).logits, lambda x: model(**x).loss, lambda: dict(handle.named_parameters()),
        handle.save,
    )  # fmt: skip


def clip(dtype: torch.dtype) -> nn.Module:
    text = WIDE | {"num_hidden_layers": 2, "max_position_embeddings": 40, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(tiny_clips.clip_config(text, WIDE | {"num_hidden_layers": 3}, 16))
    return tiny_models.randomised(model).to(dtype)


@contextmanager
def _attach(model: nn.Module, recipe: Any) -> Iterator[Held]:
    with fastprompt.attach(model, recipe) as handle:
        yield _attached(handle)


@contextmanager
def _load(model: nn.Module, folder: Any) -> Iterator[Held]:
    with fastprompt.load(model, folder) as handle:
        yield _attached(handle)


def _zero_shot(model: nn.Module, batch: Any) -> Tensor:
    with _classify(model, fastprompt.ZeroShot()) as held:
        return held.outputs(batch)


def _classifier(clf: fastprompt.CLIPClassifier) -> Held:
    return Held(
        clf.clip, lambda x: clf(**x).logits, lambda x: clf(**x).loss, lambda: dict(clf.learner.named_parameters()),
        clf.save,
    )  # fmt: skip


@contextmanager
def _classify(model: nn.Module, recipe: Any) -> Iterator[Held]:
    clf = fastprompt.CLIPClassifier(model, tiny_clips.tokenizer(), tiny_clips.NAMES[:3], recipe)
    yield _classifier(clf)
    clf.detach()


@contextmanager
def _load_classifier(model: nn.Module, folder: Any) -> Iterator[Held]:
    clf = fastprompt.CLIPClassifier.load(model, tiny_clips.tokenizer(), folder)
    yield _classifier(clf)
    clf.detach()


def llava(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = LlamaConfig(**{**tiny_decoders.DECODER, "num_attention_heads": 2, "num_key_value_heads": 1})
        vision = CLIPVisionConfig(**tiny_decoders.TOWER)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=tiny_decoders.IMAGE)
        model = LlavaForConditionalGeneration(config)
    return tiny_models.randomised(model).to(dtype)


def pictures(batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Left-padded conversations with one image each; the third is the first again."""
    found = tiny_decoders.image_inputs("LLaVA, CLIP", llava(dtype))
    return {name: x[[0, 1, 0][:batch]] for name, x in found.items()}


def _scores(model: nn.Module, batch: Any) -> Tensor:
    found = cache_cases.generate(model, batch, max_new_tokens=4)
    return torch.stack(found.scores, dim=1)


@contextmanager
def _compress(model: nn.Module, recipe: Any) -> Iterator[Held]:
    with fastprompt.compress(model, recipe):
        yield Held(model, partial(_scores, model))


def _pathways(pathways: fastprompt.TaskPathways) -> Held:
    newest = pathways.newest()
    return Held(
        pathways.model, lambda x: pathways(x["pixel_values"]).logits, lambda x: newest(**x).loss,
        lambda: dict(pathways.named_parameters()), pathways.save,
    )  # fmt: skip


@contextmanager
def _grow(model: nn.Module, recipe: Any) -> Iterator[Held]:
    pathways = fastprompt.TaskPathways(model, recipe)
    pathways.grow(3)
    yield _pathways(pathways)
    pathways.detach()


@contextmanager
def _load_pathways(model: nn.Module, folder: Any) -> Iterator[Held]:
    pathways = fastprompt.TaskPathways.load(model, folder)
    yield _pathways(pathways)
    pathways.detach()


def _unet(dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            attention_head_dim=(2, 4), cross_attention_dim=24,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).to(dtype).eval()  # fmt: skip


def _noisy(batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A noisy latent, text tokens, and the embedding of an image."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"sample": (4, 8, 8), "encoder_hidden_states": (7, 24), "image": (1, 16), "target": (4, 8, 8)}
    return {name: torch.randn(batch, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def _noise(unet: nn.Module, x: dict[str, Tensor], image: bool = True) -> Tensor:
    added = {"image_embeds": [x["image"]]} if image else {}
    return unet(x["sample"], 300, x["encoder_hidden_states"], added_cond_kwargs=added).sample


def _adapted(handle: Any) -> Held:
    unet = handle.unet
    return Held(
        unet, partial(_noise, unet), lambda x: (_noise(unet, x) - x["target"]).float().square().mean(),
        lambda: dict(handle.named_parameters()), handle.save,
    )  # fmt: skip


@contextmanager
def _attach_to_unet(unet: nn.Module, recipe: Any) -> Iterator[Held]:
    with fastprompt.diffusers.attach(unet, recipe) as handle:
        yield _adapted(handle)


@contextmanager
def _load_to_unet(unet: nn.Module, folder: Any) -> Iterator[Held]:
    with fastprompt.load(unet, folder) as handle:
        yield _adapted(handle)


HOSTS = {
    "attach": Host(vit, images, lambda model, x: model(**x).logits, _attach, _load),
    "classifier": Host(
        clip, partial(images, size=16), _zero_shot, _classify, _load_classifier, exact=False,
    ),
    "compress": Host(llava, pictures, _scores, _compress),
    "pathways": Host(vit, images, lambda model, x: model(**x).logits, _grow, _load_pathways),
    "diffusers": Host(_unet, _noisy, partial(_noise, image=False), _attach_to_unet, _load_to_unet),
}  # fmt: skip

#: Options that a recipe needs, or that keep it small.
OPTIONS: dict[str, dict[str, Any]] = {
    "VPT": {"length": 5},
    "PrefixKV": {"length": 5},
    "APT": {"length": 5, "rank": 2},
    "CoOp": {"n_ctx": 4},
    "MaPLe": {"depth": 2},
    "IVLP": {"depth": 2},
    "DPL": {"depth": 2},
    "IPAdapter": {"image_width": 16},
    "MultiLane": {"summaries": 3, "length": 2, "layers": (0, 1)},
    "AdaKV": {"policy": SnapKV(keep=0.5)},
}
