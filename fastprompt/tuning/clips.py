# SPDX-License-Identifier: Apache-2.0
"""A few-shot task for a CLIP by names: what ``fastprompt tune --recipe coop`` and its like run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprompt.data import DecodedImages, ImageDataset, ImageFolder, OpenMoji, Sample, few_shot, load_openmoji
from fastprompt.data.openmoji import Part, Style, class_part, drawer, only_classes
from fastprompt.errors import DataError

MODEL, OPENMOJI = "openmoji-clip", "openmoji"

#: What the built-in names stand for.
MODEL_ASSETS, DATA_ASSETS = ("clip-bpe",), ("openmoji", "emoji-names")


@dataclass(frozen=True)
class ClipTask:
    """Images with class names, a split of them, and the CLIP that sees them.

    Args:
        model: ``"openmoji-clip"`` (in the package), or a local folder that ``from_pretrained`` reads.
        data: ``"openmoji"`` (assets), or a folder with one folder of images a class.
        shots: Training images a class.
        eval_size: Evaluation images of a folder, balanced over all classes; None is all of the rest.
        part: ``"all"`` classes, or every other one: ``"base"`` and ``"new"``.
        style: Of OpenMoji's evaluation drawings: ``"colour"`` or ``"outline"``.
        train_style: Of its training drawings.
        templates: Texts with ``{}`` for the class name, for the zero-shot accuracy; several are an ensemble.
        class_names: Names in the order of the sorted class folders, or ``folder=name`` each; none takes the folders'.
        image_size: Pixels a side; None is what the model says.
        seed: Draws the split, and the initial prompts.
        cache_images: Compute frozen image features once.
        cache_dir: Where assets are; None is the default cache.

    Example:
        >>> ClipTask(class_names=["a=red fox"]).names(["a", "big_dog"])
        ('red fox', 'big dog')
    """

    model: str = MODEL
    data: str = OPENMOJI
    shots: int = 16
    eval_size: int | None = None
    part: Part = "all"
    style: Style = "colour"
    train_style: Style = "colour"
    templates: Sequence[str] = ("a photo of a {}.",)
    class_names: Sequence[str] = ()
    image_size: int | None = None
    seed: int = 0
    cache_images: bool = True
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("templates", "class_names"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.data == OPENMOJI and self.eval_size is not None:
            raise ValueError(
                f"eval_size: got {self.eval_size} with data='openmoji', whose test drawings are fixed; leave it out"
            )
        for name in ("style", "train_style"):
            style = getattr(self, name)
            if self.data != OPENMOJI and style != "colour":
                raise ValueError(f"{name}: got {style!r} with data={self.data!r}; only openmoji is drawn in styles")

    @property
    def assets(self) -> tuple[str, ...]:
        """Assets that the built-in names need."""
        return (MODEL_ASSETS if self.model == MODEL else ()) + (DATA_ASSETS if self.data == OPENMOJI else ())

    def build_model(self) -> tuple[Any, Any]:
        """The CLIP in eval mode, and its tokenizer.

        Raises:
            FileNotFoundError: no such folder.
        """
        if self.model == MODEL:
            from fastprompt.hf.openmoji_clip import load_openmoji_clip

            return load_openmoji_clip(cache_dir=self.cache_dir)
        if not Path(self.model, "config.json").is_file():
            raise FileNotFoundError(
                f"model: got {self.model!r}, expected {MODEL!r} or a local folder with a config.json and a tokenizer "
                "as save_pretrained writes them"
            )
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(self.model, local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(self.model, local_files_only=True)

    def images(self) -> OpenMoji | ImageFolder:
        """The drawings, or the image folder."""
        return load_openmoji(cache_dir=self.cache_dir) if self.data == OPENMOJI else ImageFolder(self.data)

    def names(self, folders: Sequence[str]) -> tuple[str, ...]:
        """What every class is called in texts: ``class_names``, or the folder with spaces for underscores.

        Args:
            folders: All classes, in order.

        Raises:
            DataError: ``class_names`` do not fit.
        """
        given = dict(line.split("=", 1) for line in self.class_names if "=" in line)
        if not given and self.class_names:
            if len(self.class_names) != len(folders):
                raise DataError(
                    f"class_names: got {len(self.class_names)} names, expected {len(folders)}, one for each class in "
                    f"order ({', '.join(folders)}), or lines folder=name"
                )
            return tuple(self.class_names)
        mixed = [line for line in self.class_names if "=" not in line]
        unknown = [name for name in given if name not in folders]
        if mixed or unknown:
            raise DataError(
                f"class_names: got {(mixed + unknown)[0]!r}, expected folder=name in every line, with folders "
                f"{', '.join(folders)}"
            )
        return tuple(given.get(name) or name.replace("_", " ") for name in folders)

    def classes(self, images: OpenMoji | ImageFolder) -> tuple[str, ...]:
        """Class names of the chosen part."""
        names = self.names(images.classes)
        return tuple(names[label] for label in class_part(names, self.part))

    def training(self, images: OpenMoji | ImageFolder, model: Any) -> DecodedImages:
        """Training images of the part, decoded once at the size that the model sees."""
        if isinstance(images, OpenMoji):
            return self._decode(images.few_shot(self.shots, self.seed), images, model, self.train_style)
        return self._decode(few_shot(images, self.shots, self.seed, self.eval_size)[0], images, model)

    def evaluation(self, images: OpenMoji | ImageFolder, model: Any, *, whole: bool = False) -> DecodedImages:
        """Evaluation images of the part.

        Args:
            images: The data.
            model: The CLIP.
            whole: All images of a folder, where none was trained on.
        """
        if isinstance(images, OpenMoji):
            return self._decode(images.test, images, model, self.style)
        samples = images.samples if whole else few_shot(images, self.shots, self.seed, self.eval_size)[1]
        return self._decode(samples, images, model)

    def _decode(
        self, samples: Sequence[Sample], images: OpenMoji | ImageFolder, model: Any, style: Style | None = None
    ) -> DecodedImages:
        from fastprompt.hf.images import image_transform

        read = None if style is None else drawer(self.image_size or model.config.vision_config.image_size, style)
        chosen = only_classes(samples, class_part(images.classes, self.part))
        return ImageDataset(chosen, self.classes(images), image_transform(model, self.image_size), read=read).load_all()
