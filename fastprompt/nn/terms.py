# SPDX-License-Identifier: Apache-2.0
"""What a recipe minimises: a weighted sum of named losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Term:
    """One summand of a loss, ``weight * loss(model, output, batch)``.

    Args:
        name: What logs call it.
        loss: Gives a scalar of the model, its output for a batch, and the batch.
        weight: A number; 0 leaves the term out, and it is not computed.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> small = Term("small logits", lambda model, output, batch: output.logits.square().mean(), weight=0.1)
        >>> output = SimpleNamespace(loss=torch.tensor(1.0), logits=torch.tensor([[2.0, 0.0]]))
        >>> total([SUPERVISED, small], nn.Identity(), output, {})
        (tensor(1.2000), {'loss': tensor(1.), 'small logits': tensor(2.)})
    """

    name: str
    loss: Callable[[nn.Module, Any, Mapping[str, Tensor]], Tensor]
    weight: float = 1.0


#: The loss that the model itself computes of the batch's labels: what most recipes minimise.
SUPERVISED = Term("loss", lambda model, output, batch: output.loss)


def terms_of(recipe: Any) -> tuple[Term, ...]:
    """The terms that a recipe minimises: those of its method ``terms()``, or the model's own loss."""
    return tuple(recipe.terms()) if hasattr(recipe, "terms") else (SUPERVISED,)


def total(
    terms: tuple[Term, ...] | list[Term], model: nn.Module, output: Any, batch: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all terms, and every term by its name, before its weight.

    Raises:
        ValueError: two terms have one name, or none is left to compute.
    """
    values: dict[str, Tensor] = {}
    parts = []
    for term in terms:
        if term.name in values:
            raise ValueError(f"terms: got two named {term.name!r}, expected a name of its own for every term")
        if term.weight:
            values[term.name] = term.loss(model, output, batch)
            parts.append(term.weight * values[term.name])
    if not parts:
        raise ValueError("terms: got none with a weight, expected something to minimise; is the recipe training-free?")
    return sum(parts[1:], parts[0]), values
