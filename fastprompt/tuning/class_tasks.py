# SPDX-License-Identifier: Apache-2.0
"""Images whose classes come task after task, by names: what ``fastprompt continual`` runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastprompt.data import DecodedImages, ImageDataset, ImageFolder, OpenMoji, few_shot, load_openmoji, textile
from fastprompt.data.openmoji import drawer
from fastprompt.tuning.continual import Task, split_classes
from fastprompt.tuning.images import ImageTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPENMOJI = "openmoji"


@dataclass(frozen=True)
class ClassTasks:
    """Images, a split of them into tasks by class, and the frozen model that sees them.

    Args:
        model: ``"dinov2-small"`` (an asset), or a local folder that ``from_pretrained`` reads.
        data: ``"openmoji"`` (an asset: drawings of Unicode's subcategories), ``"textile"`` (an asset), or a folder with
            one folder of images a class.
        tasks: How many; classes are dealt out in an order drawn by ``seed``.
        shots: Training images a class.
        eval_size: Evaluation images, balanced over classes; None is all of the rest, or OpenMoji's test drawings.
        image_size: Pixels a side that the model sees.
        seed: Draws the split, the order of classes, and initial prompts.
        cache_dir: Where assets are; None is the default cache.
    """

    model: str = "dinov2-small"
    data: str = OPENMOJI
    tasks: int = 5
    shots: int = 16
    eval_size: int | None = None
    image_size: int = 224
    seed: int = 0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.data == OPENMOJI and self.eval_size is not None:
            raise ValueError(
                f"eval_size: got {self.eval_size} with data='openmoji', whose test drawings are fixed; leave it out"
            )

    def build_model(self) -> PreTrainedModel:
        """The model; a head of its own stays unused."""
        return ImageTask(self.model, seed=self.seed, cache_dir=self.cache_dir).build_model(num_labels=2)

    def split(self, model: PreTrainedModel, *, progress: bool = True) -> list[Task]:
        """The tasks, their images decoded once at the size the model sees."""
        images = self._images()
        if isinstance(images, OpenMoji):
            parts: list[Any] = [images.few_shot(self.shots, self.seed), images.test]
        else:
            parts = list(few_shot(images, self.shots, self.seed, self.eval_size))
        train, test = (self._decode(part, images, model, progress) for part in parts)
        return split_classes(train, test, images.classes, self.tasks, self.seed)

    def _images(self) -> ImageFolder | OpenMoji:
        if self.data == OPENMOJI:
            return load_openmoji(cache_dir=self.cache_dir)
        return textile(cache_dir=self.cache_dir) if self.data == "textile" else ImageFolder(self.data)

    def _decode(self, samples: Any, images: ImageFolder | OpenMoji, model: Any, progress: bool) -> DecodedImages:
        from fastprompt.hf.images import image_transform

        transform = image_transform(model, self.image_size)
        read = drawer(self.image_size) if isinstance(images, OpenMoji) else None
        return ImageDataset(samples, images.classes, transform, read=read).load_all(progress=progress)
