# SPDX-License-Identifier: Apache-2.0
"""From a PIL image to the pixel values that a transformers vision model was trained on, without torchvision."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

# Not the top-level name: transformers 5.17 replaces that by a stub where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_CONFIG_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Preprocessing:
    """How the published checkpoints of a model family prepare images.

    Args:
        processor: the transformers class that does it (PIL backend).
        mean_std: channel means and standard deviations, after scaling to 0..1.
        default_size: side of the square output in pixels; None takes the configuration's ``image_size``.
        edge_ratio: the shortest edge is resized to ``size * edge_ratio`` before the centre crop; None resizes straight
            to the square, without a crop.
    """

    processor: str
    mean_std: tuple[Sequence[float], Sequence[float]]
    default_size: int | None = None
    edge_ratio: float | None = None


_DINOV2 = Preprocessing("BitImageProcessorPil", IMAGENET, default_size=224, edge_ratio=256 / 224)
_CLIP = Preprocessing("CLIPImageProcessorPil", OPENAI_CLIP, edge_ratio=1.0)
_SIGLIP = Preprocessing("SiglipImageProcessorPil", HALF)

FAMILIES: dict[str, Preprocessing] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    # transformers has no PIL class for DINOv3; this one differs in rounding to 8 bits after the resize.
    "dinov3_vit": Preprocessing("ViTImageProcessorPil", IMAGENET),
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": Preprocessing("ViTImageProcessorPil", HALF),
}
"""Preprocessing by ``config.model_type``, used where the checkpoint folder has none of its own."""


@dataclass(frozen=True)
class ImageTransform:
    """A transformers image processor as a plain function of one image.

    Args:
        processor: any transformers image processor.
        overrides: keyword arguments of each call, such as ``size``.
    """

    processor: Any
    overrides: dict[str, Any] = field(default_factory=dict)

    def __call__(self, image: Any) -> Tensor:
        """Return the pixel values ``[3, H, W]`` (float32) of one RGB ``PIL.Image``."""
        return self.processor(image, return_tensors="pt", **self.overrides)["pixel_values"][0].to(torch.float32)


def image_transform(source: Any, size: int | None = None) -> ImageTransform:
    """Return the function that prepares images for a model.

    The preprocessing is, in this order: ``source`` itself if it is an image processor; the ``preprocessor_config.json``
    of the local folder that the model was loaded from; the ``FAMILIES`` table, which follows the published checkpoints
    of each family. A checkpoint that departs from its family and was not loaded from a local folder needs the first:
    ``image_transform(AutoImageProcessor.from_pretrained(name, backend="pil"))``.

    Args:
        source: a transformers model, its configuration, or an image processor.
        size: side of the square output in pixels; default what the preprocessing says (224 for DINOv2).

    Returns:
        A picklable function from an RGB ``PIL.Image`` to a float32 tensor ``[3, size, size]``.

    Raises:
        ValueError: a bad ``size``, or a model family that is not in the table.

    Example:
        >>> from PIL import Image
        >>> transform = image_transform(transformers.Dinov2Config())
        >>> transform(Image.new("RGB", (250, 250))).shape
        torch.Size([3, 224, 224])
    """
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"size: got {size!r}, expected a positive number of pixels or None")
    if isinstance(source, transformers.ImageProcessingMixin):
        return ImageTransform(source, {} if size is None else _resized(source, size))
    config = getattr(source, "config", source)
    folder = getattr(config, "name_or_path", "")
    if folder and any((Path(folder) / name).is_file() for name in _CONFIG_FILES):
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        return ImageTransform(processor, {} if size is None else _resized(processor, size))
    return ImageTransform(_family_processor(config, size))


def _resized(processor: Any, size: int) -> dict[str, Any]:
    """Return call arguments that make ``processor`` give ``size``, keeping its ratio of resize to crop."""
    square = {"height": size, "width": size}
    if not getattr(processor, "do_center_crop", None):
        return {"size": square}
    crop, edges = processor.crop_size["height"], processor.size
    edge = edges["shortest_edge"] if "shortest_edge" in edges else edges["height"]
    scaled = round(size * edge / crop)
    return {
        "size": {"shortest_edge": scaled} if "shortest_edge" in edges else {"height": scaled, "width": scaled},
        "crop_size": square,
    }


def _family_processor(config: Any, size: int | None) -> Any:
    vision = getattr(config, "vision_config", config)
    model_type = getattr(vision, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"source: got {type(config).__name__} with vision model type {model_type!r}, expected one of "
            f"{', '.join(FAMILIES)}; for others pass the image processor itself, such as "
            'AutoImageProcessor.from_pretrained(name, backend="pil")'
        )
    family = FAMILIES[model_type]
    size = size or family.default_size or vision.image_size
    mean, std = family.mean_std
    square = {"height": size, "width": size}
    options: dict[str, Any] = {"size": square, "image_mean": list(mean), "image_std": list(std)}
    if family.edge_ratio is not None:
        options |= {"size": {"shortest_edge": round(size * family.edge_ratio)}, "crop_size": square}
    return getattr(transformers, family.processor)(**options)
