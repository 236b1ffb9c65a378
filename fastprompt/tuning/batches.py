# SPDX-License-Identifier: Apache-2.0
"""From examples to a loss: collate a batch, run the model on it, in eval mode and frozen."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from fastprompt.errors import DataError


class Examples(Protocol):
    """A data set: a length, and examples that are dictionaries of tensors with a whole number under ``labels``."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def __getitem__(self, index: int, /) -> dict[str, Tensor]:
        """Return one example, such as ``{"pixel_values": [C, H, W], "labels": []}``."""


def check_examples(name: str, examples: Examples) -> None:
    """Raise unless the data set has examples with labels.

    Raises:
        DataError: the data set is empty, or its first example is not a dictionary with ``labels``.
    """
    if len(examples) == 0:
        raise DataError(f"{name}: got an empty data set, expected at least one example; check its folder or split.")
    first = examples[0]
    if not isinstance(first, dict) or "labels" not in first:
        got = sorted(first) if isinstance(first, dict) else type(first).__name__
        raise DataError(f"{name}[0]: got {got}, expected a dictionary of tensors with the key 'labels'; add it.")


def load_batch(examples: Examples, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Collate the examples at ``indices`` into one dictionary of tensors ``[B, ...]`` on ``device``."""
    batch = default_collate([examples[index] for index in indices])
    return {key: value.to(device) for key, value in batch.items()}


def run_model(model: nn.Module, batch: dict[str, Tensor], autocast: Literal["bfloat16"] | None) -> Any:
    """Return the output of ``model(**batch)``, with a scalar ``loss`` and ``logits [B, C]``.

    Raises:
        TypeError: the model's output lacks a loss or logits.
    """
    with torch.autocast(batch["labels"].device.type, dtype=torch.bfloat16, enabled=autocast is not None):
        output = model(**batch)
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    if not isinstance(loss, Tensor) or not isinstance(logits, Tensor):
        raise TypeError(
            f"model: got an output {type(output).__name__} with loss {type(loss).__name__} and logits "
            f"{type(logits).__name__}, expected tensors; use a model for classification that computes its loss."
        )
    return output


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; give every module its own flag back afterwards.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with eval_mode(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def frozen_except(model: nn.Module, trainable: Iterable[Tensor]) -> Iterator[None]:
    """Freeze every parameter of the model but ``trainable``; thaw those that it froze afterwards.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with frozen_except(model, [model.bias]):
        ...     model.weight.requires_grad, model.bias.requires_grad
        (False, True)
        >>> model.weight.requires_grad
        True
    """
    kept = {id(tensor) for tensor in trainable}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
