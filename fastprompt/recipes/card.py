# SPDX-License-Identifier: Apache-2.0
"""What is known of a published method: the facts beside its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: How a recipe is used.
USES = {
    "attach": "fastprompt.attach(model, recipe)",
    "classifier": "fastprompt.CLIPClassifier(clip, tokenizer, classnames, recipe)",
    "compress": "fastprompt.compress(model, recipe)",
    "pathways": "fastprompt.TaskPathways(model, recipe)",
    "diffusers": "fastprompt.diffusers.attach(unet, recipe)",
}

#: How a recipe's numbers relate to the method's: the same; the same method, whose own numbers approximate another's;
#: or with parts that are ours, because the paper's were not to be had.
STATUSES = ("exact", "approximation", "reconstruction")


@dataclass(frozen=True)
class Card:
    """Facts of one method, held to its recipe by one test over all of them.

    Args:
        title: The paper's title.
        paper: Its address.
        tier: 1: kernels of its own; 2: a thin recipe; 3: another domain's model.
        family: The kind of method, e.g. ``"visual prompt"``.
        use: One of `USES`.
        status: One of `STATUSES`.
        trains: Patterns (``fnmatch``) of the names of exactly those parameters that get a gradient; () learns nothing.
        row: Number in the project's list of 65 methods; None is a baseline beside it.
        headline: The paper's own number; no test here confirms it.
        repo: The authors' code, ``owner/name``.
        identity: Options of the recipe under which a model gives what it gave before, bit for bit or to rounding; None:
            there are none, and ``deviations`` or the recipe say why.
        deviations: What is not the paper's, and what was not verified.
        needs: Packages that are in no extra of their own.

    Example:
        >>> from fastprompt.recipes.vpt import CARD
        >>> CARD.use, CARD.status, CARD.trains
        ('attach', 'exact', ('layers.*.prompt', 'layers.*.projection.*'))
    """

    title: str
    paper: str
    tier: int
    family: str
    use: str
    status: str
    trains: tuple[str, ...]
    row: int | None = None
    headline: str = ""
    repo: str | None = None
    identity: Mapping[str, Any] | None = field(default=None, hash=False)
    deviations: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def __post_init__(self):
        if self.use not in USES:
            raise ValueError(f"use: got {self.use!r}, expected one of {', '.join(map(repr, USES))}")
        if self.status not in STATUSES:
            raise ValueError(f"status: got {self.status!r}, expected one of {', '.join(map(repr, STATUSES))}")
