# SPDX-License-Identifier: Apache-2.0
"""A few-shot image task by names: what ``fastprompt tune``, ``eval`` and ``demo`` run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from fastprompt.data import DecodedImages, ImageDataset, ImageFolder, few_shot, textile

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ImageTask:
    """Images, a split of them, and the frozen model that sees them.

    Args:
        model: ``"dinov2-small"`` (an asset), or a local folder that ``from_pretrained`` reads.
        data: ``"textile"`` (an asset), or a folder with one folder of images a class.
        shots: Training images a class.
        eval_size: Evaluation images, balanced over classes; None is all of the rest.
        image_size: Pixels a side that the model sees.
        seed: Draws the split, and the initial head and prompts.
        cache_dir: Where assets are; None is the default cache.
    """

    model: str = "dinov2-small"
    data: str = "textile"
    shots: int = 16
    eval_size: int | None = 300
    image_size: int = 224
    seed: int = 0
    cache_dir: str | None = None

    def images(self) -> ImageFolder:
        """The image folder."""
        return textile(cache_dir=self.cache_dir) if self.data == "textile" else ImageFolder(self.data)

    def build_model(self, num_labels: int) -> PreTrainedModel:
        """The model with a fresh linear head, drawn from ``seed``."""
        torch.manual_seed(self.seed)
        if self.model == "dinov2-small":
            from fastprompt.data import assets
            from fastprompt.hf.dinov2_onnx import load_dinov2_small

            path = assets.entry("dinov2-small", cache_dir=self.cache_dir)
            return load_dinov2_small(path, num_labels=num_labels)
        if not Path(self.model, "config.json").is_file():
            raise FileNotFoundError(
                f"model: got {self.model!r}, expected 'dinov2-small' or a local folder with a config.json "
                "as save_pretrained writes it"
            )
        from transformers import AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(
            self.model, num_labels=num_labels, ignore_mismatched_sizes=True, local_files_only=True
        )
        return model.eval()

    def split(self, model: PreTrainedModel, *, progress: bool = True) -> tuple[DecodedImages, DecodedImages]:
        """Training and evaluation images, decoded once at the size the model sees."""
        from fastprompt.hf.images import image_transform

        folder = self.images()
        transform = image_transform(model, self.image_size)
        train, held_out = few_shot(folder, self.shots, self.seed, self.eval_size)
        decoded = [
            ImageDataset(part, folder.classes, transform).load_all(progress=progress) for part in (train, held_out)
        ]
        return decoded[0], decoded[1]


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Top-level names of the parameters outside the vision tower: the head that trains with the prompts.

    Raises:
        ValueError: all parameters are inside the tower; the model has no head to train.
    """
    from fastprompt.hf.sites import choose_tower

    tower = choose_tower(model, "vision").name.split(".")[0]
    heads = sorted({name.split(".")[0] for name, _ in model.named_parameters()} - {tower, model.base_model_prefix})
    if not tower or not heads:
        raise ValueError(f"model: {type(model).__name__} has no head; expected an image classification model")
    return tuple(heads)


def best_autocast(device: str = "cpu") -> Literal["bfloat16"] | None:
    """``"bfloat16"`` where the device computes in it, None elsewhere."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return "bfloat16" if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
