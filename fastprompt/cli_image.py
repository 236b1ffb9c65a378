# SPDX-License-Identifier: Apache-2.0
"""``fastprompt tune --recipe vpt | apt``: images with prompts in a vision model and a linear head."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import fastprompt
from fastprompt.cli_job import Job, resolved
from fastprompt.errors import DataError

if TYPE_CHECKING:
    from fastprompt.tuning.batches import Examples
    from fastprompt.tuning.images import ImageTask

OPTIONS: dict[str, Any] = {
    "model": "dinov2-small", "data": "textile", "length": 10, "layers": None, "image_size": 224, "depth": "deep",
    "epochs": 30, "batch_size": 16, "lr": 1e-2, "weight_decay": None, "optimizer": None, "warmup": None,
}  # fmt: skip


#: What APT's paper and code have: 50 or 200 prompts, rank 4. No depth: prompts never become tokens.
APT_OPTIONS = {name: value for name, value in OPTIONS.items() if name != "depth"} | {
    "length": 50, "rank": 4, "zero_init": False, "lr": 1e-3,
}  # fmt: skip


class ImageJob(Job):
    """Prompts and a linear head on a vision model."""

    kind, noun = "image", "images"
    options: ClassVar = {"vpt": OPTIONS, "apt": APT_OPTIONS}
    free = Job.free | {"eval_size"}

    def __init__(self, task: ImageTask, recipe: Any, autocast: Any, device: str, classes: list[str] | None):
        self.task, self.recipe, self.autocast = task, recipe, autocast
        self.classes = classes or list(task.images().classes)
        model: Any = task.build_model(len(self.classes))
        self.model = model.to(device)

    @classmethod
    def add_arguments(cls, sub: argparse.ArgumentParser) -> None:
        """Declare what only APT takes; ``--image-size`` and ``--depth`` are for CLIP recipes as well."""
        group = sub.add_argument_group("images or texts with --recipe apt: prompts read behind attention")
        group.add_argument("--rank", type=int, help=f"of the map from prompts to keys [{APT_OPTIONS['rank']}]")
        group.add_argument(
            "--zero-init", action="store_true", default=None, help="start as the frozen model [as released: not]"
        )

    @classmethod
    def start(cls, args: argparse.Namespace, autocast: Any, device: str) -> ImageJob:
        """The job of a command line."""
        from fastprompt.tuning.images import ImageTask

        model, data = (resolved(getattr(args, name), OPTIONS[name]) for name in ("model", "data"))
        recipe: Any = fastprompt.VPT(args.length, args.depth, args.layers) if args.recipe == "vpt" else apt(args)
        task = ImageTask(model, data, args.shots, args.eval_size, args.image_size, args.seed, args.cache_dir)
        return cls(task, recipe, autocast, device, None)

    @classmethod
    def read_task(cls, fields: dict[str, Any]) -> ImageTask:
        """The task of a run file."""
        from fastprompt.tuning.images import ImageTask

        return ImageTask(**fields)

    @classmethod
    def restore(cls, task: ImageTask, run: dict[str, Any], args: argparse.Namespace, device: str) -> ImageJob:
        """The job of a finished run."""
        return cls(task, None, run["autocast"], device, run["classes"])

    def split(self) -> tuple[Examples, Examples]:
        """Training and evaluation images."""
        return self.task.split(self.model)

    def attach(self, train_set: Examples) -> Any:
        """Prompts in every layer, and a head that trains with them."""
        from fastprompt.tuning.images import head_names

        return fastprompt.attach(self.model, self.recipe, tower="vision", train=head_names(self.model))

    def load(self, folder: Path) -> None:
        """Put saved prompts and head in place."""
        fastprompt.load(self.model, folder)

    def evaluation(self, data: str | None) -> Examples:
        """Held-out images, or all of another folder with the same classes."""
        if data is None:
            return self.split()[1]
        from fastprompt.data import ImageDataset, ImageFolder
        from fastprompt.hf.images import image_transform

        folder = ImageFolder(data)
        if list(folder.classes) != self.classes:
            raise DataError(f"data: got classes {list(folder.classes)}, expected {self.classes}, those of the run")
        transform = image_transform(self.model, self.task.image_size)
        return ImageDataset(folder.samples, folder.classes, transform).load_all()


def apt(args: argparse.Namespace) -> fastprompt.APT:
    """The recipe of a command line with ``--recipe apt``."""
    return fastprompt.APT(args.length, args.rank, layers=args.layers, zero_init=args.zero_init)
