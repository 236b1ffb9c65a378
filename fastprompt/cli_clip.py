# SPDX-License-Identifier: Apache-2.0
"""``fastprompt tune --recipe coop`` and its like: learned prompts of a CLIP, and its zero-shot accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import fastprompt
from fastprompt.cli_job import SETTINGS, Job, resolved

if TYPE_CHECKING:
    from torch import Tensor

    from fastprompt.data import DecodedImages
    from fastprompt.tuning import EvalResult
    from fastprompt.tuning.clips import ClipTask

_TASK: dict[str, Any] = {
    "model": "openmoji-clip", "data": "openmoji", "classes": "all", "style": "colour", "class_names": None,
    "templates": None, "image_size": None, "no_image_cache": None, "batch_size": None,
}  # fmt: skip
# What is left out is as published: the recipe says it.
_TRAINED = _TASK | dict.fromkeys(SETTINGS)

#: Images at a time in evaluations.
EVAL_BATCH = 32


class ClipJob(Job):
    """A CLIP whose class texts, and vision tower, carry learned prompts."""

    kind, noun, baseline = "clip", "images", "zero-shot"
    options: ClassVar = {
        "coop": _TRAINED | dict.fromkeys(("n_ctx", "init", "csc", "position")),
        "cocoop": _TRAINED | dict.fromkeys(("n_ctx", "init")),
        "maple": _TRAINED | dict.fromkeys(("n_ctx", "init", "depth")),
        "ivlp": _TRAINED | dict.fromkeys(("n_ctx", "n_vision", "init", "depth")),
        "dpl": _TRAINED
        | dict.fromkeys(("n_ctx", "n_vision", "init", "depth", "lam", "lam_value", "branches", "conditioned")),
        "zeroshot": _TASK,
    }
    free = Job.free | {"eval_size", "cache_images", "templates"}

    def __init__(self, task: ClipTask, recipe: Any, autocast: Any, device: str):
        self.task, self.recipe, self.autocast = task, recipe, autocast
        self.images = task.images()
        self.classes = list(task.classes(self.images))
        clip, self.tokenizer = task.build_model()
        self.clip = clip.to(device)

    @classmethod
    def add_arguments(cls, sub: argparse.ArgumentParser) -> None:
        """Declare what only a CLIP takes."""
        group = sub.add_argument_group("a CLIP (--recipe coop, cocoop, maple, ivlp, dpl, zeroshot): learned prompts")
        group.add_argument("--n-ctx", type=int, help="context tokens [16 or those of --init; maple, ivlp, dpl: 2]")
        group.add_argument("--n-vision", type=int, help="ivlp, dpl: prompts of a vision layer [2]")
        group.add_argument("--init", metavar="WORDS", help="words whose embeddings start the context; none: random "
                           "[coop: none; others: 'a photo of a']")  # fmt: skip
        group.add_argument("--csc", action="store_true", default=None, help="coop: one context a class")
        group.add_argument("--position", choices=("end", "middle", "front"), help="coop: where the name stands [end]")
        group.add_argument("--lam", choices=("exact", "constant", "learned", "per_head"),
                           help="dpl: how λ is found [learned]")  # fmt: skip
        group.add_argument("--lam-value", type=float, help="dpl: λ, or what it starts at [0.1]")
        group.add_argument("--branches", choices=("xx", "xp", "pp", "px"), nargs="+",
                           help="dpl: what instance rows (x) and prompt rows (p) read [all]")  # fmt: skip
        group.add_argument("--conditioned", action="store_true", default=None,
                           help="dpl: text prompts depend on the class name")  # fmt: skip
        group.add_argument("--class-names", type=Path, metavar="FILE", help="a name a line, in the order of the sorted "
                           "class folders, or folder=name [the folders' names]")  # fmt: skip
        group.add_argument("--templates", type=Path, metavar="FILE", help="texts with {} for the class name, one a "
                           "line, for the zero-shot accuracy ['a photo of a {}.']")  # fmt: skip
        group.add_argument("--classes", choices=("all", "base", "new"), help="base, new: every other class [all]")
        group.add_argument("--style", choices=("colour", "outline"), help="OpenMoji's drawings, of training and "
                           "evaluation [colour]")  # fmt: skip
        group.add_argument("--no-image-cache", action="store_true", default=None,
                           help="encode images again in every epoch")  # fmt: skip

    @classmethod
    def start(cls, args: argparse.Namespace, autocast: Any, device: str) -> ClipJob:
        """The job of a command line; built-in assets that are not there are fetched."""
        from fastprompt.data import assets
        from fastprompt.recipes.zero_shot import check_templates
        from fastprompt.tuning.clips import ClipTask

        given = {name: getattr(args, name) for name in ("templates", "class_names")}
        chosen: dict[str, Any] = {name: resolved(getattr(args, name), _TASK[name]) for name in ("model", "data")}
        chosen |= {name: _lines(name, file) for name, file in given.items() if file is not None}
        task = ClipTask(
            shots=args.shots, eval_size=args.eval_size, part=args.classes, image_size=args.image_size, seed=args.seed,
            style=args.style, train_style=args.style, cache_images=not args.no_image_cache, cache_dir=args.cache_dir,
            **chosen,
        )  # fmt: skip
        recipe = cls.name_recipe(args, check_templates(task.templates))
        state = {status.asset.name: status.state for status in assets.status(cache_dir=args.cache_dir)}
        for name in task.assets:
            if state[name] == "missing":
                assets.fetch(name, cache_dir=args.cache_dir)
        return cls(task, recipe, autocast, device)

    @classmethod
    def name_recipe(cls, args: argparse.Namespace, templates: Sequence[str]) -> Any:
        """The recipe of a command line."""
        from fastprompt.recipes.registry import CLIP_RECIPES

        methods = {name.lower(): recipe for name, recipe in CLIP_RECIPES.items()}
        options = {name: getattr(args, name) for name in cls.options[args.recipe].keys() - _TRAINED.keys()}
        options = {name: value for name, value in options.items() if value is not None}
        if options.get("init") == "none":
            options["init"] = None
        if args.recipe == "zeroshot":
            options["templates"] = templates
        return methods[args.recipe](**options)

    @classmethod
    def read_task(cls, fields: dict[str, Any]) -> ClipTask:
        """The task of a run file."""
        from fastprompt.tuning.clips import ClipTask

        return ClipTask(**fields)

    @classmethod
    def restore(cls, task: ClipTask, run: dict[str, Any], args: argparse.Namespace, device: str) -> ClipJob:
        """The job of a finished run, on the data, classes and style that ``eval`` names."""
        changes: dict[str, Any] = {}
        if args.data is not None:
            data = resolved(args.data, _TASK["data"])
            changes = {"data": data, "eval_size": None, "part": "all", "class_names": ()}
        if args.class_names is not None:
            changes["class_names"] = _lines("class_names", args.class_names)
        changes |= {"part": args.classes} if args.classes else {}
        changes |= {"style": args.style} if args.style else {}
        return cls(replace(task, **changes), None, run["autocast"], device)

    def settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """Options of the `TuneConfig`: as published, but for those that are given."""
        from fastprompt.recipes.dassl import one_epoch

        given = super().settings(args)
        if not hasattr(self.recipe, "published"):
            return {"eval_batch_size": EVAL_BATCH} | given
        if args.epochs is not None:
            given = {"warmup": one_epoch(args.epochs)} | given
        return self.recipe.published(args.shots) | {"eval_batch_size": EVAL_BATCH} | given

    def split(self) -> tuple[DecodedImages, DecodedImages]:
        """Training and evaluation images."""
        return self.task.training(self.images, self.clip), self.task.evaluation(self.images, self.clip)

    def without_prompts(self, examples: Any, batch_size: int) -> EvalResult:
        """Evaluate the CLIP with the names in templates."""
        from fastprompt.tuning import evaluate

        recipe = fastprompt.ZeroShot(self.task.templates)
        classifier = fastprompt.CLIPClassifier(self.clip, self.tokenizer, self.classes, recipe)
        try:
            return evaluate(classifier, examples, batch_size=batch_size, autocast=self.autocast)
        finally:
            classifier.detach()

    def attach(self, train_set: Any) -> Learned | None:
        """A classifier with fresh prompts."""
        import torch

        torch.manual_seed(self.task.seed)
        cache = self.task.cache_images and isinstance(self.recipe, (fastprompt.CoOp, fastprompt.CoCoOp))
        self.model = fastprompt.CLIPClassifier(self.clip, self.tokenizer, self.classes, self.recipe, cache_images=cache)
        if cache:
            self._encode(train_set)
        return Learned(self.model) if self.model.num_trainable else None

    def save(self, folder: Path) -> None:
        """Write the classifier."""
        self.model.save(folder)

    def load(self, folder: Path) -> None:
        """The saved classifier, on the classes of the task."""
        self.model = fastprompt.CLIPClassifier.load(self.clip, self.tokenizer, folder, classnames=self.classes)

    def evaluation(self, data: str | None) -> DecodedImages:
        """Held-out images, or all of another folder."""
        return self.task.evaluation(self.images, self.clip, whole=data is not None)

    def _encode(self, images: DecodedImages) -> None:
        """Fill the cache in an order that no batch decides: a feature's last bit depends on its neighbours."""
        import torch

        from fastprompt.tuning.progress import progress_bar

        device = self.clip.logit_scale.device
        with (
            torch.no_grad(),
            torch.autocast(device.type, torch.bfloat16, enabled=self.autocast is not None),
            progress_bar("encode", len(images), unit="image", shown=True, leave=False) as bar,
        ):
            for pixels in images.pixel_values.split(EVAL_BATCH):
                self.model.image_features(pixels.to(device))
                bar.update(len(pixels))


class Learned:
    """What `tune` trains of a classifier, and saves."""

    def __init__(self, classifier: Any):
        self.classifier = classifier

    def parameters(self) -> Iterable[Tensor]:
        """The learner's."""
        return self.classifier.learner.parameters()

    def save(self, folder: str | Path) -> None:
        """Write the classifier."""
        self.classifier.save(folder)

    def __repr__(self) -> str:
        return f"{self.classifier.recipe!r}: {self.classifier.num_trainable:,} trainable parameters"


def _lines(name: str, file: Path) -> tuple[str, ...]:
    """The lines of a file that hold something."""
    option = "--" + name.replace("_", "-")
    if not file.is_file():
        raise ValueError(f"{option}: got {file}, which is no file; expected a text file with one a line")
    found = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not found:
        raise ValueError(f"{option}: got {file}, which is empty; expected one a line")
    return found
