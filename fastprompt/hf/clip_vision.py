# SPDX-License-Identifier: Apache-2.0
"""CLIP's vision tower: unit image features, their cache, and the prompts that a CLIP recipe puts into the tower."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastprompt.hf.attention import CHILD
from fastprompt.hf.clip import unit
from fastprompt.hf.sites import Site, choose_tower
from fastprompt.nn.dual_prompt import DualPrompt
from fastprompt.nn.prompts import CarriedPrompt, ComputedPrompt, versions_of
from fastprompt.ops.checks import readable


@dataclass
class Scored(ModelOutput):
    """Loss and logits ``[B,C]`` of a batch."""

    loss: Tensor | None = None
    logits: Tensor | None = None


def check_labels(labels: Tensor, batch: int, classes: int) -> None:
    """Raise ValueError unless ``labels`` are int64 ``[B]`` with values in ``[0, classes)``."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (batch,):
        got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: got {got}, expected int64 [{batch}], one class number an image")
    # On a GPU, the loss finds what is out of range.
    if not labels.numel() or not readable(labels):
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(f"labels: got {wrong}, expected class numbers from 0 to {classes - 1}")


def check_clip(clip: Any) -> None:
    """Raise TypeError unless ``clip`` has both towers."""
    needed = ("get_image_features", "get_text_features", "logit_scale")
    missing = [name for name in needed if not hasattr(clip, name)]
    if not isinstance(clip, PreTrainedModel) or missing:
        lacks = f", which lacks {', '.join(missing)}" if isinstance(clip, PreTrainedModel) else ""
        raise TypeError(f"clip: got {type(clip).__name__}{lacks}, expected a transformers CLIPModel or one like it")


def image_features(model: Any, pixel_values: Tensor) -> Tensor:
    """Unit image features ``[B,D]`` of a CLIP-like model, in at least float32."""
    found = model.get_image_features(pixel_values=pixel_values)
    return unit(found if isinstance(found, Tensor) else found.pooler_output)


def prompted_layers(attentions: list[nn.Module]) -> int:
    """How many attention modules hold prompts."""
    return sum(hasattr(attention, CHILD) for attention in attentions)


class VisionPrompts:
    """The vision side of a `DualPrompt` as a recipe for `attach`.

    The first layer's prompts enter before the tower's own first norm (``pre_layrnorm``), as released.
    """

    kind = "vision"
    projects = True
    outputs = False
    tokens = None

    def __init__(self, clip: Any, learner: DualPrompt):
        self.learner = learner
        self.entry: Any = getattr(choose_tower(clip, "vision").module, "pre_layrnorm", None)

    def build(self, sites: list[Site]) -> dict[int, nn.Module]:
        """One prompt module for each of the first J layers; if they are split, for all that their rows run through."""
        depth, length = self.learner.vision_depth, self.learner.vision_length
        splits: Any = list(self.learner.vision_split)
        prompts: dict[int, nn.Module] = {
            i: ComputedPrompt(
                partial(self._rows, i), length, self.learner.parameters, sites[i],
                inserted=i == depth - 1 < len(sites) - 1, split=splits[i] if splits else None,
            )
            for i in range(depth)
        }  # fmt: skip
        return prompts | {i: CarriedPrompt(length, splits[i]) for i in range(depth, len(splits))}

    def _rows(self, layer: int) -> Tensor:
        rows = self.learner.vision_rows(layer)
        return rows if layer or self.entry is None else self.entry(rows.to(self.entry.weight.dtype))


class ImageCache:
    """Image features by the bytes of the image, in memory, until a weight changes."""

    def __init__(self):
        self._found: dict[tuple, Tensor] = {}
        self._weights: tuple = ()

    def lookup(self, pixel_values: Tensor, compute: Callable[[Tensor], Tensor], weights: Iterable[Tensor]) -> Tensor:
        """Features ``[B,D]``; only images not seen before are computed, each once.

        Args:
            pixel_values: ``[B,...]``.
            compute: Gives the features of images.
            weights: The tensors that it reads.
        """
        versions = versions_of(weights)
        if versions != self._weights:
            self._found, self._weights = {}, versions
        device = pixel_values.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        images = pixel_values.detach().cpu().contiguous()
        about = (images.dtype, tuple(images.shape[1:]), autocast)
        keys = [
            (*about, hashlib.blake2b(x.flatten().view(torch.uint8).numpy(), digest_size=16).digest()) for x in images
        ]
        new = {key: i for i, key in enumerate(keys) if key not in self._found}
        if new:
            with torch.no_grad():
                features = compute(pixel_values[list(new.values())])
            self._found.update(zip(new, features, strict=True))
        return torch.stack([self._found[key] for key in keys]).to(pixel_values.device)
