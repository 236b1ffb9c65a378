# SPDX-License-Identifier: Apache-2.0
"""Zero-shot classification with hand-written templates: nothing is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastprompt.nn.dual_prompt import DualPrompt
from fastprompt.recipes.card import Card

if TYPE_CHECKING:
    from fastprompt.hf.clip import ClipSites

TEMPLATE = "a photo of a {}."

CARD = Card(
    title="Learning Transferable Visual Models From Natural Language Supervision",
    paper="https://arxiv.org/abs/2103.00020",
    tier=2,
    family="zero-shot",
    use="classifier",
    status="exact",
    trains=(),
    repo="openai/CLIP",
    identity={},
)


@dataclass(frozen=True)
class ZeroShot:
    """CLIP as it is (Radford et al., 2021, https://arxiv.org/abs/2103.00020): the baseline of every prompt.

    A class's feature is the unit mean of the unit features of its name in every template.

    Args:
        templates: Texts with one ``{}`` for the class name; several are an ensemble.

    Example:
        >>> from fastprompt import ZeroShot
        >>> ZeroShot(["a photo of a {}.", "a drawing of a {}."]).templates
        ('a photo of a {}.', 'a drawing of a {}.')
    """

    templates: Sequence[str] = (TEMPLATE,)

    position = "end"
    share = "all"
    init = None

    def __post_init__(self):
        object.__setattr__(self, "templates", check_templates(self.templates))

    def build(self, sites: ClipSites) -> DualPrompt:
        """Nothing."""
        return DualPrompt()


def check_templates(templates: object) -> tuple[str, ...]:
    """Templates as a tuple; one string is one template.

    Raises:
        ValueError: none, or one without exactly one slot ``{}``.
    """
    found = (templates,) if isinstance(templates, str) else tuple(templates) if isinstance(templates, Sequence) else ()
    wrong = [t for t in found if not isinstance(t, str) or t.count("{}") != 1 or t.count("{") != 1 or t.count("}") != 1]
    if not found or wrong:
        got = repr(wrong[0]) if wrong else repr(templates)
        raise ValueError(f"templates: got {got}, expected texts with one {{}} for the class name: 'a photo of a {{}}.'")
    return found
