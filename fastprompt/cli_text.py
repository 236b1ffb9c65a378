# SPDX-License-Identifier: Apache-2.0
"""``fastprompt tune --task text``: texts with key-value prefixes, or APT, in a causal language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import fastprompt
from fastprompt.cli_image import apt
from fastprompt.cli_job import Job, resolved
from fastprompt.errors import DataError

if TYPE_CHECKING:
    from fastprompt.tuning import EvalResult
    from fastprompt.tuning.batches import Examples
    from fastprompt.tuning.texts import TextTask

#: The network that gives keys and values wants smaller steps than keys and values themselves (P-Tuning v2: 1e-2).
LR, MLP_LR = 1e-2, 1e-3

OPTIONS: dict[str, Any] = {
    "model": "smollm2-135m", "data": "sms-spam", "length": 8, "layers": None, "reparam": "none", "template": None,
    "words": {}, "max_tokens": 64, "part": "test",
    "epochs": 30, "batch_size": 16, "lr": None, "weight_decay": None, "optimizer": None, "warmup": None,
}  # fmt: skip


APT_OPTIONS = {name: value for name, value in OPTIONS.items() if name != "reparam"} | {
    "length": 50, "rank": 4, "zero_init": False,
}  # fmt: skip


class TextJob(Job):
    """Prompts in a language model that scores the words of the classes."""

    kind, noun, baseline = "text", "texts", "without prompts"
    options: ClassVar = {"prefix": OPTIONS, "apt": APT_OPTIONS}

    def __init__(self, task: TextTask, recipe: Any, autocast: Any, device: str, classes: list[str] | None):
        import torch

        self.task, self.recipe, self.autocast = task, recipe, autocast
        self.classes = classes or list(task.texts().classes)
        # Frozen weights need no more than the type they are used in.
        dtype = torch.bfloat16 if autocast else torch.float32
        self.model = task.build_model(tuple(self.classes), dtype).to(device)
        torch.manual_seed(task.seed)

    @classmethod
    def add_arguments(cls, sub: argparse.ArgumentParser) -> None:
        """Declare what only texts take."""
        group = sub.add_argument_group("texts (--task text): prompts in a causal language model")
        group.add_argument("--reparam", choices=("mlp", "none"), help="mlp: learn the prompts through a network "
                           "(prefix tuning); none: learn keys and values (P-Tuning v2) [none]")  # fmt: skip
        group.add_argument(
            "--template",
            help="what the model reads, with {text}; \\n is a line break [the asset's own, or '{text}\\nLabel:']",
        )
        group.add_argument("--words", type=_word, nargs="+", metavar="CLASS=WORD", help="the word that names a class "
                           "[the class name]")  # fmt: skip
        group.add_argument("--max-tokens", type=int, help=f"longer texts are cut [{OPTIONS['max_tokens']}]")
        group.add_argument("--part", choices=("test", "validation"), help="evaluate on validation texts to choose "
                           f"settings [{OPTIONS['part']}]")  # fmt: skip

    @classmethod
    def start(cls, args: argparse.Namespace, autocast: Any, device: str) -> TextJob:
        """The job of a command line."""
        reparam = None if args.reparam == "none" else args.reparam
        prefix = args.recipe == "prefix"
        recipe = fastprompt.PrefixKV(args.length, reparam, layers=args.layers) if prefix else apt(args)
        return cls(cls.name_task(args), recipe, autocast, device, None)

    @classmethod
    def name_task(cls, args: argparse.Namespace) -> TextTask:
        """The task of a command line."""
        from fastprompt.tuning.texts import TextTask

        model, data = (resolved(getattr(args, name), OPTIONS[name]) for name in ("model", "data"))
        # A shell passes a line break most easily as these two characters.
        template = args.template and args.template.replace("\\n", "\n")
        return TextTask(
            model, data, args.shots, args.eval_size, args.part, template, dict(args.words), args.max_tokens,
            args.seed, args.cache_dir,
        )  # fmt: skip

    @classmethod
    def read_task(cls, fields: dict[str, Any]) -> TextTask:
        """The task of a run file."""
        from fastprompt.tuning.texts import TextTask

        return TextTask(**fields)

    @classmethod
    def restore(cls, task: TextTask, run: dict[str, Any], args: argparse.Namespace, device: str) -> TextJob:
        """The job of a finished run."""
        return cls(task, None, run["autocast"], device, run["classes"])

    def settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """Options of the `TuneConfig`; the rate depends on what is learned."""
        return {"lr": MLP_LR if args.reparam == "mlp" or args.recipe == "apt" else LR} | super().settings(args)

    def split(self) -> tuple[Examples, Examples]:
        """Training and evaluation texts as token ids."""
        train, held_out = self.task.split(self.model)
        if train.cut + held_out.cut:
            cut = train.cut + held_out.cut
            print(f"{cut} texts were longer than {self.task.max_tokens} tokens and are cut (--max-tokens)")
        return train, held_out

    def without_prompts(self, examples: Examples, batch_size: int) -> EvalResult:
        """Evaluate the language model as it is."""
        from fastprompt.tuning import evaluate

        return evaluate(self.model, examples, batch_size=batch_size, autocast=self.autocast)

    def attach(self, train_set: Examples) -> Any:
        """Prompts in every layer."""
        return fastprompt.attach(self.model.lm, self.recipe, tower="text")

    def load(self, folder: Path) -> None:
        """Put saved prompts in place."""
        fastprompt.load(self.model.lm, folder)

    def evaluation(self, data: str | None) -> Examples:
        """Held-out texts, or all of another file with the same classes."""
        if data is None:
            return self.task.split(self.model)[1]
        from fastprompt.data import read_texts

        texts = read_texts(data)
        if list(texts.classes) != self.classes:
            raise DataError(f"data: got classes {list(texts.classes)}, expected {self.classes}, those of the run")
        return self.model.encode(texts.samples, self.task.max_tokens)


def _word(text: str) -> tuple[str, str]:
    name, equals, word = text.partition("=")
    if not (name and equals and word):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected CLASS=WORD")
    return name, word
