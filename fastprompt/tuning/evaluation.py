# SPDX-License-Identifier: Apache-2.0
"""Accuracy and loss of a classifier on a data set."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastprompt.tuning.batches import Examples, check_examples, device_of, eval_mode, load_batch, run_model
from fastprompt.tuning.progress import progress_bar
from fastprompt.tuning.randomness import cuda_devices


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured.

    Args:
        accuracy: fraction of the examples whose highest logit is their label, from 0 to 1.
        loss: mean over the examples.
        n: number of examples.
        class_correct: correct examples of each class, in the order of the logits.
        class_count: examples of each class, in the order of the logits.
    """

    accuracy: float
    loss: float
    n: int
    class_correct: tuple[int, ...]
    class_count: tuple[int, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "EvalResult":
        """Return the result whose ``dataclasses.asdict`` went through JSON, where tuples become lists."""
        counts = {key: tuple(values[key]) for key in ("class_correct", "class_count")}
        return cls(**(values | counts))

    @property
    def class_accuracy(self) -> tuple[float, ...]:
        """Accuracy of each class, from 0 to 1; NaN for a class without examples."""
        pairs = zip(self.class_correct, self.class_count, strict=True)
        return tuple(correct / count if count else float("nan") for correct, count in pairs)


def evaluate(
    model: nn.Module,
    dataset: Examples,
    *,
    batch_size: int,
    autocast: Literal["bfloat16"] | None = None,
    progress: bool = True,
) -> EvalResult:
    """Measure a classifier in eval mode without gradients; the model and torch's generators are left as they were.

    Args:
        model: called as ``model(**batch)``, returns an object with ``.loss`` (a mean over the batch) and ``.logits``
            ``[B, C]``.
        dataset: examples as dictionaries of tensors with ``labels``.
        batch_size: examples a batch.
        autocast: ``"bfloat16"`` or None for the model's own types (default None).
        progress: show a bar (default True).

    Raises:
        ValueError: ``batch_size`` is below 1, or ``autocast`` is unknown.
        DataError: the data set is empty or has no labels.
        TypeError: the model returns no loss or no logits.

    Example:
        >>> from types import SimpleNamespace
        >>> class Sign(nn.Module):
        ...     def forward(self, pixel_values, labels):
        ...         logits = torch.stack([-pixel_values, pixel_values], dim=-1)
        ...         return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)
        >>> signs = [{"pixel_values": torch.tensor(x), "labels": torch.tensor(int(x > 0))} for x in (-1.0, 1.0)]
        >>> evaluate(Sign(), signs, batch_size=2, progress=False).accuracy
        1.0
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1; pass batch_size=32, say.")
    if autocast not in ("bfloat16", None):
        raise ValueError(f"autocast: got {autocast!r}, expected 'bfloat16' or None; pass one of them.")
    check_examples("dataset", dataset)
    n, device = len(dataset), device_of(model)
    loss_sum = 0.0
    correct = count = torch.zeros(0, dtype=torch.int64)
    # A model that draws random numbers even here must not change what is drawn after.
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(cuda_devices(model)):
        with progress_bar("evaluate", n, unit="example", shown=progress, leave=False) as bar:
            for start in range(0, n, batch_size):
                indices = range(start, min(start + batch_size, n))
                batch = load_batch(dataset, indices, device)
                output = run_model(model, batch, autocast)
                loss, logits, labels = output.loss, output.logits, batch["labels"]
                classes = logits.shape[-1]
                loss_sum += loss.item() * len(indices)
                if start == 0:
                    correct = count = torch.zeros(classes, dtype=torch.int64)
                count = count + labels.bincount(minlength=classes).cpu()
                correct = correct + labels[logits.argmax(-1) == labels].bincount(minlength=classes).cpu()
                bar.update(len(indices))
    hits = tuple(correct.tolist())
    return EvalResult(sum(hits) / n, loss_sum / n, n, hits, tuple(count.tolist()))
