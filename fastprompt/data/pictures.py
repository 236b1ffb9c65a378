# SPDX-License-Identifier: Apache-2.0
"""Questions about several pictures: OpenMoji drawings of twelve kinds, all shown first, then each asked for.

Kinds are groups of Unicode's subcategories with short names; test drawings are those of ``fastprompt.data.openmoji``,
and nothing of their families is among the others. The twelve were chosen as those that a linear probe on DINOv2
features tells apart, test drawings included.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastprompt.data.images import check_count
from fastprompt.data.openmoji import OpenMoji
from fastprompt.errors import DataError

#: Words that answer, and the subcategories that they stand for; a name that ends with ``*`` is a beginning.
KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("animal-*",),
    "arrow": ("arrow",),
    "building": ("place-building", "place-religious"),
    "clock": ("time",),
    "face": ("face-*",),
    "flag": ("country-flag", "flag"),
    "food": ("food-prepared", "food-fruit", "food-vegetable", "food-asian", "food-sweet", "drink"),
    "heart": ("heart",),
    "letter": ("alphanum",),
    "person": ("person", "person-*"),
    "shape": ("geometric",),
    "vehicle": ("transport-ground", "transport-water", "transport-air"),
}
IMAGE = "<image>"
_SHOWN, _ASKED = "Picture {place}: {image}\n", "Picture {place}:"


class PictureQuestions(NamedTuple):
    """A context of pictures, and the order in which they are asked for.

    Attributes:
        files: One drawing a picture.
        answers: The kind of each, in the order of ``files``.
        order: Places in ``files``, from 0.
    """

    files: tuple[Path, ...]
    answers: tuple[str, ...]
    order: tuple[int, ...]

    @property
    def text(self) -> str:
        """The prompt, with ``<image>`` where a picture stands."""
        return context_text(len(self.files))


def context_text(pictures: int) -> str:
    r"""The prompt that shows pictures.

    Example:
        >>> context_text(2)
        'Picture 1: <image>\nPicture 2: <image>\n'
    """
    return "".join(_SHOWN.format(place=place + 1, image=IMAGE) for place in range(pictures))


def question_text(place: int) -> str:
    """The question about picture ``place``, counted from 0; a space and the kind should follow.

    Example:
        >>> question_text(2)
        'Picture 3:'
    """
    return _ASKED.format(place=place + 1)


def kind_of(subcategory: str) -> str | None:
    """Return the kind of a subcategory, None where it belongs to none.

    Example:
        >>> kind_of("animal-bug"), kind_of("sport")
        ('animal', None)
    """
    for kind, names in KINDS.items():
        for name in names:
            if subcategory == name or (name.endswith("*") and subcategory.startswith(name[:-1])):
                return kind
    return None


def training_drawings(data: OpenMoji) -> dict[str, list[tuple[Path, ...]]]:
    """Emoji of every kind outside the test families, each with its skin tones."""
    found: dict[str, list[tuple[Path, ...]]] = {kind: [] for kind in KINDS}
    for item in data.pretraining:
        kind = kind_of(item.subcategory)
        if kind is not None:
            found[kind].append((item.file, *item.tones))
    return found


def held_out_drawings(data: OpenMoji) -> dict[str, list[Path]]:
    """Test drawings of every kind, of the subcategories that are classes of the task in ``openmoji``."""
    found: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for sample in data.test:
        kind = kind_of(data.subcategories[sample.label])
        if kind is not None:
            found[kind].append(sample.file)
    return found


def picture_questions(drawings: Mapping[str, Sequence[Path]], pictures: int, seed: int) -> PictureQuestions:
    """Draw pictures, each of a kind drawn evenly and without regard to the others, and the order of the questions.

    Args:
        drawings: Files of every kind.
        pictures: How many, at least 1.
        seed: Of the draw.

    Raises:
        DataError: a kind has no drawing.

    Example:
        >>> task = picture_questions({"cat": [Path("a"), Path("b")], "dog": [Path("c")]}, pictures=3, seed=0)
        >>> task.answers, task.order
        (('dog', 'dog', 'cat'), (1, 2, 0))
    """
    check_count("pictures", pictures)
    empty = [kind for kind, files in drawings.items() if not files]
    if empty or not drawings:
        raise DataError(f"drawings: got none of {', '.join(empty) or 'any kind'}, expected at least one of each kind")
    draw = random.Random(seed)
    answers = tuple(draw.choices(sorted(drawings), k=pictures))
    files = tuple(draw.choice(drawings[kind]) for kind in answers)
    order = tuple(draw.sample(range(pictures), pictures))
    return PictureQuestions(files, answers, order)
