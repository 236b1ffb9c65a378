# SPDX-License-Identifier: Apache-2.0
"""What ``fastprompt tune`` and ``eval`` ask of a task: its options, its data, and a model with prompts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from fastprompt.tuning import EvalResult
    from fastprompt.tuning.batches import Examples
    from fastprompt.tuning.supervised import Handle

#: Options that become a `fastprompt.tuning.TuneConfig`; None in ``Job.options`` leaves the choice to ``settings``.
SETTINGS = ("epochs", "batch_size", "lr", "weight_decay", "optimizer", "warmup")


class Job:
    """A task of the command line with its model in memory.

    Attributes:
        kind: Name of the task.
        noun: What an example is.
        baseline: What the model is without prompts; None where it cannot classify without training.
        options: For every recipe the options that belong to it, with their values where they are left out.
        free: Fields of the task that do not change what a run computes.
        task: The task by names.
        classes: Class names, in the order of the logits.
        model: What runs.
        autocast: ``"bfloat16"`` or None.
    """

    kind: ClassVar[str]
    noun: ClassVar[str]
    baseline: ClassVar[str | None] = None
    options: ClassVar[dict[str, dict[str, Any]]]
    free: ClassVar[frozenset[str]] = frozenset({"cache_dir", "seed"})

    task: Any
    classes: list[str]
    model: Any
    recipe: Any
    autocast: Literal["bfloat16"] | None

    @classmethod
    def add_arguments(cls, sub: argparse.ArgumentParser) -> None:
        """Declare the options of ``fastprompt tune`` that are of this task alone."""
        raise NotImplementedError

    @classmethod
    def start(cls, args: argparse.Namespace, autocast: Any, device: str) -> Job:
        """The job of a command line, its options filled in."""
        raise NotImplementedError

    @classmethod
    def read_task(cls, fields: dict[str, Any]) -> Any:
        """The task of a run file."""
        raise NotImplementedError

    @classmethod
    def restore(cls, task: Any, run: dict[str, Any], args: argparse.Namespace, device: str) -> Job:
        """The job of a finished run, on the data that ``fastprompt eval`` names."""
        raise NotImplementedError

    def settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """Options of the `TuneConfig`."""
        return {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}

    def split(self) -> tuple[Examples, Examples]:
        """Training and evaluation examples."""
        raise NotImplementedError

    def without_prompts(self, examples: Examples, batch_size: int) -> EvalResult:
        """Evaluate what ``baseline`` names."""
        raise NotImplementedError

    def attach(self, train_set: Examples) -> Handle | None:
        """Put fresh prompts in place; None where nothing is learned."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the prompts of a job that learns nothing."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Put saved prompts in place."""
        raise NotImplementedError

    def evaluation(self, data: str | None) -> Examples:
        """Held-out examples, or all of other ``data``."""
        raise NotImplementedError

    def about(self) -> dict[str, str]:
        """What decides what a run computes, beside its `TuneConfig`."""
        found = {name: str(value) for name, value in asdict(self.task).items() if name not in self.free}
        return found | {"recipe": repr(self.recipe), "classes": ", ".join(self.classes)}


def resolved(name: str, builtin: str) -> str:
    """A path made absolute, so that ``eval`` finds it from anywhere; the name of an asset as it is."""
    return name if name == builtin else str(Path(name).resolve())
