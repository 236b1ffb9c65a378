# SPDX-License-Identifier: Apache-2.0
"""Long texts that need no download: a number hidden in filler, and the reference documentation of Python."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

from fastprompt.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

_HEAD = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "What is the pass key? The pass key is"


class Passkey(NamedTuple):
    """A prompt, and the digits that should follow it.

    Attributes:
        text: Filler with the number somewhere inside, and the question.
        key: Five digits.
    """

    text: str
    key: str


def passkey(tokenizer: Any, length: int, depth: float, seed: int) -> Passkey:
    """A five-digit number hidden in repeated filler (Mohtashami and Jaggi, https://arxiv.org/abs/2305.16300).

    Args:
        tokenizer: Counts tokens.
        length: Tokens of the prompt, at most; a filler line fewer, at least.
        depth: Where the number stands: 0 before the filler, 1 behind it.
        seed: Draws the number.

    Raises:
        DataError: ``length`` has no room for the number, or ``depth`` is not within 0 and 1.
    """
    if not 0 <= depth <= 1:
        raise DataError(f"depth: got {depth!r}, expected a number from 0 to 1")
    key = str(random.Random(seed).randrange(10_000, 100_000))

    def text(lines: int) -> str:
        before = round(depth * lines)
        return _HEAD + before * _FILLER + _NEEDLE.format(key=key) + (lines - before) * _FILLER + _QUESTION

    def tokens(lines: int) -> int:
        return len(tokenizer(text(lines)).input_ids)

    least, line = tokens(0), tokens(2) - tokens(1)
    if length < least:
        raise DataError(
            f"length: got {length} tokens, expected at least {least}, what the number and the question take"
        )
    lines = (length - least) // line
    while tokens(lines) > length:  # tokens may not add up exactly
        lines -= 1
    return Passkey(text(lines), key)


def excerpt(tokenizer: Any, length: int, number: int) -> Tensor:
    """Tokens ``[1,length]`` of the reference documentation that every Python carries (``help("topics")``).

    Args:
        tokenizer: Makes the tokens.
        length: How many.
        number: Excerpt 0 begins with the text, every further one a sixteenth of the text later.

    Raises:
        DataError: the text ends before.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    start = number * len(text) // 16
    # Words of ten characters would be long, tokens are shorter.
    ids = tokenizer(text[start : start + 10 * length], return_tensors="pt").input_ids[:, :length]
    if ids.shape[1] < length:
        raise DataError(f"length: got {length} tokens from excerpt {number} on, expected at most {ids.shape[1]}")
    return ids
