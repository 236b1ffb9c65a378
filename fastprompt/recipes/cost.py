# SPDX-License-Identifier: Apache-2.0
"""What prompts add to a forward of a frozen model, counted in multiply-adds from the shapes of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastprompt.recipes.apt import APT
from fastprompt.recipes.prefix_kv import PrefixKV
from fastprompt.recipes.vpt import VPT

if TYPE_CHECKING:
    from fastprompt.hf.shapes import Layer

#: The form that APT's paper counts deep prompts in.
BASELINE = "keys and values of every sample, dead queries too"


@dataclass(frozen=True)
class Cost:
    """One way to run a recipe.

    Args:
        recipe: Its name.
        form: How it runs.
        trained: Numbers that learn.
        multiply_adds: Added to the forward of one sample.
    """

    recipe: str
    form: str
    trained: int
    multiply_adds: float


def own_cost(layers: Sequence[Layer], tokens: Sequence[int], context: int | None = None) -> int:
    """Multiply-adds of one sample in the frozen layers: their matrices and their attention.

    Args:
        layers: Those of a tower.
        tokens: Tokens of a sample, for every stack of the tower.
        context: Tokens that cross-attention reads; None for as many as the layer has.
    """
    total = 0
    for layer in layers:
        n = tokens[layer.stack]
        total += layer.weights * n
        for attention in layer.attentions:
            crossed = attention.site.part > 0 and context is not None
            m = context if crossed and context is not None else n
            total += 2 * attention.queries * n * m + attention.matrices[1] * (m - n)
    return total


def prompt_costs(layers: Sequence[Layer], recipe: Any, tokens: Sequence[int], batch: int = 1) -> list[Cost]:
    """What a recipe adds to the forward of one sample, in its published form and in fastprompt's.

    Matrix products alone are counted, as papers do: no softmax, activation or sum.

    Args:
        layers: Those of a tower, from `fastprompt.hf.shapes.layers_of`.
        recipe: `APT`, `VPT` (deep, up to the last layer) or `PrefixKV`.
        tokens: Tokens of a sample, for every stack of the tower.
        batch: Samples that share what is computed once a batch (identity I2).

    Raises:
        ValueError: another recipe, or one whose prompts run as tokens.
    """
    forms = FORMS.get(type(recipe))
    if forms is None:
        raise ValueError(f"recipe: got {recipe!r}, expected one of {', '.join(kind.__name__ for kind in FORMS)}")
    attentions = [(a, layer) for layer in layers for a in layer.attentions if recipe.outputs or not a.site.part]
    built = recipe.build([a.site for a, _ in attentions])
    learned = {id(p): p.numel() for module in built.values() for p in module.parameters()}
    if any(getattr(module, "inserted", False) for module in built.values()):
        raise ValueError(f"recipe: got {recipe!r}, expected deep prompts up to the last layer; others run as tokens")
    totals: dict[str, float] = {}
    for place in built:
        attention, layer = attentions[place]
        for form, added in forms(recipe, attention, layer, tokens[layer.stack], batch).items():
            totals[form] = totals.get(form, 0) + added
    return [Cost(type(recipe).__name__, form, sum(learned.values()), added) for form, added in totals.items()]


def _apt(recipe: APT, attention: Any, layer: Layer, n: int, batch: int) -> dict[str, float]:
    width, p = attention.site.width, recipe.length
    read, mapped = 2 * n * p * width, 2 * recipe.rank * p * width
    return {
        "as published: one sample": read + mapped,
        f"fastprompt: key map once a batch of {batch}": read + mapped / batch,
        "fastprompt, baked": read,
    }


def _vpt(recipe: VPT, attention: Any, layer: Layer, n: int, batch: int) -> dict[str, float]:
    p, seen = recipe.length, 2 * attention.queries * n * recipe.length
    query, key_value = attention.matrices
    return {
        "as published: tokens in every layer": layer.weights * p + 2 * attention.queries * p * (2 * n + p),
        BASELINE: (query + key_value) * p + seen,
        f"fastprompt: keys and values once a batch of {batch}": key_value * p / batch + seen,
        "fastprompt, baked": seen,
    }


def _prefix(recipe: PrefixKV, attention: Any, layer: Layer, n: int, batch: int) -> dict[str, float]:
    return {"learned keys and values": 2 * attention.queries * n * recipe.length}


FORMS: dict[type, Callable[..., dict[str, float]]] = {VPT: _vpt, APT: _apt, PrefixKV: _prefix}
