# SPDX-License-Identifier: Apache-2.0
"""Class-incremental learning: task after task, each measured on all classes seen so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastprompt.errors import DataError
from fastprompt.tuning.batches import Examples
from fastprompt.tuning.config import TuneConfig
from fastprompt.tuning.evaluation import EvalResult, evaluate
from fastprompt.tuning.journal import Journal, Record
from fastprompt.tuning.loop import LOG
from fastprompt.tuning.progress import progress_bar
from fastprompt.tuning.supervised import tune


class Task(NamedTuple):
    """Classes that are learned together; labels of both sets count from 0 in this task."""

    classes: tuple[str, ...]
    train: Examples
    test: Examples


class Grows(Protocol):
    """What `continual` trains, such as `fastprompt.TaskPathways`: called as ``model(**batch)`` for all classes."""

    @property
    def classnames(self) -> tuple[str, ...]:
        """Classes of all tasks, in the order of the logits."""

    def grow(self, classes: Sequence[str]) -> None:
        """Add a task."""

    def newest(self) -> nn.Module:
        """The last task alone: a module with its parameters and logits."""

    def save(self, directory: Path) -> None:
        """Write what was learned."""


@dataclass(frozen=True)
class ContinualResult:
    """What `continual` measured.

    Args:
        accuracy: row i holds the accuracy on the test examples of tasks 0 to i after task i was learned, the highest
            of all logits of tasks 0 to i being the answer.
        seen: after each task, the accuracy on the test examples of all tasks so far together.
    """

    accuracy: tuple[tuple[float, ...], ...]
    seen: tuple[float, ...]

    @property
    def average(self) -> float:
        """Mean accuracy over tasks after the last."""
        return sum(self.accuracy[-1]) / len(self.accuracy)

    @property
    def incremental(self) -> float:
        """Mean of ``seen``: the average incremental accuracy."""
        return sum(self.seen) / len(self.seen)

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy a task had, less its last; 0 for one task.

        Example:
            >>> round(ContinualResult(((0.9,), (0.7, 0.8)), (0.9, 0.75)).forgetting, 6)
            0.2
        """
        last = self.accuracy[-1]
        drops = [max(row[j] for row in self.accuracy[j:]) - last[j] for j in range(len(last) - 1)]
        return sum(drops) / len(drops) if drops else 0.0


class Relabelled:
    """Some examples of a data set, under other labels.

    Args:
        examples: the data set.
        places: of the old label, by label; examples of other labels are left out.

    Example:
        >>> examples = [{"labels": torch.tensor(label)} for label in (0, 1, 2, 1)]
        >>> [int(x["labels"]) for x in Relabelled(examples, {1: 5, 2: 6})]
        [5, 6, 5]
    """

    def __init__(self, examples: Examples, places: Mapping[int, int]) -> None:
        self.examples, self.places = examples, dict(places)
        self.indices = [i for i in range(len(examples)) if int(examples[i]["labels"]) in self.places]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.examples[self.indices[index]]
        label = example["labels"]
        return example | {"labels": torch.full_like(label, self.places[int(label)])}


def split_classes(train: Examples, test: Examples, classes: Sequence[str], tasks: int, seed: int = 0) -> list[Task]:
    """Cut the classes of a data set into tasks, in an order drawn by ``seed``; the first get one more if need be.

    Args:
        train: examples to learn from; labels index ``classes``.
        test: examples to measure on.
        classes: class names.
        tasks: how many tasks.
        seed: the order.

    Raises:
        ValueError: more tasks than classes, or none.
        DataError: a task without examples.

    Example:
        >>> examples = [{"labels": torch.tensor(label)} for label in range(5)]
        >>> [task.classes for task in split_classes(examples, examples, "abcde", 2)]
        [('e', 'a', 'b'), ('d', 'c')]
    """
    if not 1 <= tasks <= len(classes):
        raise ValueError(f"tasks: got {tasks}, expected 1 to {len(classes)}, the number of classes")
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for first in range(tasks):
        size, more = divmod(len(order), tasks)
        start = first * size + min(first, more)
        group = order[start : start + size + (first < more)]
        places = {label: place for place, label in enumerate(group)}
        task = Task(tuple(classes[i] for i in group), Relabelled(train, places), Relabelled(test, places))
        for name, examples in (("train", task.train), ("test", task.test)):
            if not len(examples):
                raise DataError(f"{name}: got no example of {', '.join(task.classes)}, expected at least one a task")
        found.append(task)
    return found


def continual(
    model: Any,
    tasks: Sequence[Task],
    *,
    config: TuneConfig,
    out_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    about: Mapping[str, str | int] | None = None,
) -> ContinualResult:
    """Learn tasks one after the other, each from its own examples alone, and measure all seen so far after each.

    For every task: ``model.grow(classes)``, `fastprompt.tuning.tune` on ``model.newest()``, and an evaluation of the
    whole model on every task so far.

    ``out_dir`` gets a folder ``task-{i}`` with log and checkpoint of each task, ``log.jsonl`` with one line a task, and
    at the end what ``model.save(out_dir)`` writes. A run that is stopped anywhere and resumed computes, on a CPU, the
    same bits as one that is not.

    Args:
        model: `fastprompt.TaskPathways` without tasks, or what grows as they do (`Grows`).
        tasks: what to learn, in order.
        config: hyper-parameters of every task.
        out_dir: folder for logs, checkpoints and the result; None writes nothing (default None).
        resume: go on from what ``out_dir`` holds (default False).
        progress: show bars (default True).
        about: what else the run is; a checkpoint of a run that says otherwise is refused.

    Raises:
        ValueError: the model has tasks already, or there is none to learn.
        FileExistsError: ``out_dir`` holds a run and ``resume`` is False.
        CheckpointError: a checkpoint is damaged or belongs to another run.
        FloatingPointError: loss or gradient is not finite.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> import fastprompt
        >>> vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                          image_size=32, patch_size=16))
        >>> pathways = fastprompt.TaskPathways(vit, fastprompt.MultiLane(summaries=2, length=2, layers=[0]))
        >>> images = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.tensor(i)} for i in range(4)]
        >>> tasks = split_classes(images, images, ["cat", "dog", "cow", "pig"], 2)
        >>> result = continual(pathways, tasks, config=TuneConfig(epochs=2), progress=False)
        >>> len(result.seen), pathways.classnames
        (2, ('cat', 'dog', 'pig', 'cow'))
    """
    if not tasks or model.classnames:
        raise ValueError(
            f"model: got {len(model.classnames)} classes and {len(tasks)} tasks to learn, expected a model without "
            "classes and at least one task"
        )
    folder = None if out_dir is None else Path(out_dir)
    measured: list[Record] = []
    journal = None if folder is None else _open(folder, resume, measured)
    try:
        with progress_bar("continual", len(tasks), unit="task", shown=progress) as bar:
            for number in range(len(tasks)):
                record = _learn(model, tasks, number, config, folder, resume, progress, about or {})
                if number == len(measured):
                    measured.append(record | _measure(model, tasks[: number + 1], config, progress))
                    if journal is not None:
                        journal.write(measured[-1])
                bar.set_postfix({"classes": len(model.classnames), "acc": f"{measured[number]['seen']:.3g}"})
                bar.update()
    finally:
        if journal is not None:
            journal.close()
    if folder is not None:
        model.save(folder)
    return ContinualResult(tuple(tuple(r["accuracy"]) for r in measured), tuple(r["seen"] for r in measured))


def _open(folder: Path, resume: bool, measured: list[Record]) -> Journal:
    """The log; a resumed one gives the lines of tasks that were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOG
    if not path.exists():
        return Journal(path)
    if not resume:
        raise FileExistsError(
            f"out_dir: got {folder} with the {LOG} of an earlier run, expected a folder without one; pass resume=True "
            "(--resume) to go on with that run, or choose another folder."
        )

    def keep(record: Record) -> bool:
        if record.get("task") != len(measured):
            return False
        measured.append(record)
        return True

    return Journal(path, keep=keep)


def _learn(
    model: Any,
    tasks: Sequence[Task],
    number: int,
    config: TuneConfig,
    folder: Path | None,
    resume: bool,
    progress: bool,
    about: Mapping[str, str | int],
) -> Record:
    """Add a task and train it; what was trained before an interruption comes back from its checkpoint."""
    task = tasks[number]
    with torch.random.fork_rng([]):
        torch.manual_seed(config.seed + number)
        model.grow(task.classes)
    newest = model.newest()
    result = tune(
        newest, newest, task.train, config=config, resume=resume and folder is not None, progress=progress,
        out_dir=None if folder is None else folder / f"task-{number}",
        about={**about, "task": number, "learned": ", ".join(model.classnames)},
    )  # fmt: skip
    return {"event": "task", "task": number, "classes": len(task.classes), "steps": result.steps,
            "train_loss": result.train_loss}  # fmt: skip


def _measure(model: Any, tasks: Sequence[Task], config: TuneConfig, progress: bool) -> Record:
    """Accuracy on every task, by the logits of all."""
    found: list[EvalResult] = []
    first = 0
    for task in tasks:
        labels = {place: first + place for place in range(len(task.classes))}
        size, autocast = config.eval_batch_size or config.batch_size, config.autocast
        examples = Relabelled(task.test, labels)
        found.append(evaluate(model, examples, batch_size=size, autocast=autocast, progress=progress))
        first += len(task.classes)
    seen = sum(r.accuracy * r.n for r in found) / sum(r.n for r in found)
    return {"accuracy": [r.accuracy for r in found], "seen": seen}
