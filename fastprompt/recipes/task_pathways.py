# SPDX-License-Identifier: Apache-2.0
"""Task pathways: tasks learned one after the other, each in a lane of its own beside one frozen stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastprompt.errors import AttachError, CheckpointError
from fastprompt.hf import checkpoint
from fastprompt.hf.clip_vision import Scored, check_labels
from fastprompt.hf.lanes import LaneTower
from fastprompt.nn.lanes import Lane
from fastprompt.recipes.layers import is_count
from fastprompt.recipes.multi_lane import MultiLane

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TaskPathways(nn.Module):
    """Classes learned task after task on a frozen vision transformer: a lane a task, its head, one shared stream.

    The frozen model runs once for all tasks, without gradients. Lanes of all tasks are one batch axis (identity I5): a
    layer pools the stream's tokens for all of them in one `fastprompt.ops.summarize_tokens` and attends with a prompt a
    task in one `fastprompt.ops.prompt_attention`. Features are the lanes' class tokens behind the model's final norm,
    scaled to unit length; logits are those of all tasks' heads, in the order of `grow`.

    A new task starts with the selectors and prompts of the one before. Older tasks are frozen, and their logits stay
    what they were, bit for bit: lanes run ``block`` at a time, the last block filled up, so that no matrix product
    changes its shape when a task is added (with another shape, PyTorch may pick another order of summation).

    Args:
        model: A transformers vision transformer with a class token (ViT, DeiT, DINOv2, the vision tower of a CLIP). It
            is frozen and kept in eval mode until `detach`; a head of its own is not used.
        recipe: A `fastprompt.MultiLane`.
        block: Lanes that run as one batch. None is all of them, without filling up: fastest for many tasks, and older
            logits then move by rounding errors when a task is added.

    Raises:
        TypeError: not a transformers model, or another recipe.
        AttachError: the tower already holds prompts.
        UnsupportedModelError: the model has no class token, rotates keys, or hides its projections.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> import fastprompt
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                    image_size=32, patch_size=16)
        >>> pathways = TaskPathways(ViTModel(config), fastprompt.MultiLane(summaries=3, length=4, layers=[0, 1]))
        >>> pathways.grow(["cat", "dog"])
        >>> newest = pathways.newest()
        >>> newest(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
        >>> pathways.grow(["bird"])
        >>> pathways.classnames, pathways(torch.randn(2, 3, 32, 32)).logits.shape
        (('cat', 'dog', 'bird'), torch.Size([2, 3]))

    MULTI-LANE: https://arxiv.org/abs/2405.15633
    """

    def __init__(self, model: PreTrainedModel, recipe: MultiLane, *, block: int | None = 4):
        super().__init__()
        if not isinstance(recipe, MultiLane):
            raise TypeError(f"recipe: got {recipe!r}, expected fastprompt.MultiLane(...)")
        if block is not None and not is_count(block):
            raise ValueError(f"block: got {block!r}, expected an integer >= 1, or None for all lanes at once")
        self.recipe, self.block = recipe, block
        self.tasks: list[tuple[str, ...]] = []
        self.lanes = nn.ModuleList()
        # No submodule: state dict and parameters are those of the lanes.
        self.base = LaneTower(model)
        try:
            self.prompted = recipe.chosen(len(self.base.sites))
        except BaseException:
            self.base.release()
            raise

    @property
    def model(self) -> PreTrainedModel:
        """The frozen model, of its own class."""
        return self.base.model

    @property
    def classnames(self) -> tuple[str, ...]:
        """The classes of all tasks, in the order of the logits."""
        return tuple(name for names in self.tasks for name in names)

    @property
    def num_trainable(self) -> int:
        """Number of trainable scalars: those of the newest task."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def grow(self, classes: Sequence[str] | int) -> None:
        """Add a task, which starts with the prompts of the one before, and freeze that.

        Args:
            classes: Names of the task's classes, or how many there are.

        Raises:
            ValueError: no class, or a name that an earlier task has.
        """
        known = self.classnames
        if is_count(classes):
            classes = [f"class {len(known) + i}" for i in range(cast(int, classes))]
        names = tuple(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
        twice = sorted({n for n in names if isinstance(n, str) and (n in known or names.count(n) > 1)})
        if not names or twice or any(not isinstance(n, str) or not n for n in names):
            what = f", of which {', '.join(twice)} exist" if twice else ""
            raise ValueError(
                f"classes: got {classes!r}{what}, expected new names, at least one, or a number of classes"
            )
        self._check_attached()
        place = next(p for p in self.model.parameters() if p.is_floating_point())
        dtype = torch.promote_types(self.base.sites[0].dtype, torch.float32)
        lane = self.recipe.lane(self.base.sites, len(names)).to(place.device, dtype)
        if len(self.lanes):
            lane.follow(self._lane(-1))
        for older in self.lanes:
            older.requires_grad_(False)
        self.lanes.append(lane)
        self.tasks.append(names)

    def newest(self) -> NewestLane:
        """The last task alone, to train: a module whose parameters are those of its lane."""
        self._check_attached()
        if not self.tasks:
            raise ValueError("lanes: got no task, expected at least one; call grow(classes) first")
        return NewestLane(self)

    def _lane(self, task: int) -> Lane:
        lane = self.lanes[task]
        if not isinstance(lane, Lane):
            raise TypeError(f"lanes: got {type(lane).__name__}, expected a Lane")
        return lane

    def features(self, pixel_values: Tensor, *, task: int | None = None) -> Tensor:
        """Unit features ``[T,B,C]`` of every task, or ``[1,B,C]`` of one, in at least float32."""
        self._check_attached()
        if not self.tasks:
            raise ValueError("lanes: got no task, expected at least one; call grow(classes) first")
        count = len(self.tasks)
        if task is not None and not -count <= task < count:
            raise ValueError(f"task: got {task}, expected a number in [-{count}, {count - 1}]")
        tasks = list(range(count)) if task is None else [task % count]
        block = len(tasks) if task is not None or self.block is None else self.block
        found = []
        with self.base.stream(pixel_values):
            for first in range(0, len(tasks), block):
                part = tasks[first : first + block]
                lanes = [self._lane(t) for t in part + part[-1:] * (block - len(part))]
                found.append(self.base.features(lanes, self.prompted, self.recipe.replace)[: len(part)])
        return torch.cat(found)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, *, task: int | None = None) -> Scored:
        """Logits of all tasks' classes, or of one task's, and the cross entropy with ``labels``.

        Args:
            pixel_values: ``[B,3,H,W]`` as the model expects.
            labels: int64 ``[B]``, classes by their place in the logits.
            task: Run one task alone, by its number.

        Returns:
            ``.loss`` (None without labels) and ``.logits [B,classes]``.
        """
        if not isinstance(pixel_values, Tensor) or pixel_values.dim() != 4 or not len(pixel_values):
            got = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise ValueError(f"pixel_values: got {got}, expected a tensor [B,3,H,W] of at least one image")
        features = self.features(pixel_values, task=task)
        lanes = range(len(self.tasks)) if task is None else [task]
        if labels is not None:
            check_labels(labels, len(pixel_values), sum(len(self.tasks[t]) for t in lanes))
        heads = [self._lane(t).head for t in lanes]
        # Heads differ in size, and one product over all of them would change its shape with every task.
        logits = torch.cat([head(x.to(head.weight.dtype)) for head, x in zip(heads, features, strict=True)], dim=-1)
        return Scored(loss=None if labels is None else cross_entropy(logits.float(), labels), logits=logits)

    def _apply(self, fn: Callable, recurse: bool = True) -> TaskPathways:
        # Lanes and the model that they run through move and change type together.
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def save(self, directory: str | Path) -> None:
        """Write ``prompt_config.json`` and ``prompts.safetensors`` to ``directory``, each replaced atomically."""
        self._check_attached()
        content = {
            "method": type(self.recipe).__name__, "config": asdict(self.recipe), "tower": "vision", "train": [],
            "base": checkpoint.describe_base(self.base), "tasks": self.tasks,
        }  # fmt: skip
        checkpoint.write(Path(directory), content, dict(self.named_parameters()))

    @classmethod
    def load(cls, model: PreTrainedModel, directory: str | Path, *, block: int | None = 4) -> TaskPathways:
        """The tasks that `save` wrote, on the model they were learned on; the last one is trainable.

        Args:
            model: The base model (same weights; another float dtype is fine).
            directory: Holds both files.
            block: As for new pathways.

        Raises:
            CheckpointError: a file is missing or changed, or belongs to another method or model, which stays as it was.
        """
        content, tensors = checkpoint.read(Path(directory))
        tasks = content.get("tasks")
        names = isinstance(tasks, list) and all(isinstance(t, list) for t in tasks)
        if content["method"] != MultiLane.__name__ or not names or tasks is None:
            raise CheckpointError(f"method: got {content['method']!r}, expected {MultiLane.__name__!r} with its tasks")
        try:
            with torch.random.fork_rng([]):  # the initial lanes are drawn, and then replaced
                found = cls(model, MultiLane(**content["config"]), block=block)
                try:
                    for classes in tasks:
                        found.grow(classes)
                except BaseException:
                    found.detach()
                    raise
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"model: the saved lanes do not fit {type(model).__name__}: {error}") from error
        try:
            checkpoint.check_base(content, found.base)
            expected = dict(found.named_parameters())
            checkpoint.check_tensors(tensors, expected, type(model).__name__)
            with torch.no_grad():
                for name, parameter in expected.items():
                    parameter.copy_(tensors[name])
        except BaseException:
            found.detach()
            raise
        return found

    def detach(self) -> None:
        """Give the model back: outputs, modes, configs and ``requires_grad`` flags as before."""
        self._check_attached()
        self.base.release()

    def _check_attached(self) -> None:
        if not self.base.attached:
            raise AttachError("pathways: detached already; build new ones, or load saved ones with TaskPathways.load")

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{type(self.model).__name__}, {self.recipe!r}, classes={[len(t) for t in self.tasks]}"


class NewestLane(nn.Module):
    """The last task of `TaskPathways` alone: logits of its classes, labels counted from its first."""

    def __init__(self, pathways: TaskPathways):
        super().__init__()
        self._pathways, self._task = (pathways,), len(pathways.tasks) - 1
        self.lane = pathways._lane(self._task)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Scored:
        """As `TaskPathways.forward` of the task."""
        return self._pathways[0](pixel_values, labels, task=self._task)
