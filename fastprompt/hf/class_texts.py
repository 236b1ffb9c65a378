# SPDX-License-Identifier: Apache-2.0
"""Class names as token sequences with slots for a learned context: ids, and slot m as ``-1 - m``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Words:
    """A tokenizer beside the text tower that it belongs to.

    Args:
        tokenizer: Any object with transformers' call (``add_special_tokens=``; returns ``input_ids``),
            ``bos_token_id`` and ``eos_token_id``.
        vocabulary: Rows of the tower's token embedding.
        limit: The tower's longest text, in tokens.
        causal: The tower is causal and reads a text at its end token; one that is not reads at the last position, so
            its texts have no start token and are padded to ``limit``.

    Raises:
        TypeError: no tokenizer.
        ValueError: no start or end token, or ids outside the vocabulary.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, limit: int, causal: bool = True):
        if not callable(tokenizer):
            raise TypeError(f"tokenizer: got {type(tokenizer).__name__}, expected a tokenizer that can be called")
        self.tokenizer, self.vocabulary, self.limit, self.causal = tokenizer, vocabulary, limit, causal
        eos = self._special("eos_token_id")
        pad = getattr(tokenizer, "pad_token_id", None)
        self.start = [self._special("bos_token_id")] if causal else []
        self.end, self.pad = eos, eos if pad is None else pad

    def _special(self, name: str) -> int:
        found = getattr(self.tokenizer, name, None)
        if found is None:
            role = "the start" if name[0] == "b" else "the end of text (EOT), where a text is read"
            raise ValueError(f"tokenizer: got no {name}, expected the id of {role}; use the tokenizer of the model")
        return self._checked([int(found)], name)[0]

    def _checked(self, ids: list[int], text: str) -> list[int]:
        wrong = [i for i in ids if not 0 <= i < self.vocabulary]
        if wrong:
            raise ValueError(
                f"tokenizer: got id {wrong[0]} for {text!r}, expected ids from 0 to {self.vocabulary - 1}, the model's "
                "vocabulary; use the tokenizer that belongs to the model"
            )
        return ids

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        encoded = self.tokenizer(text, add_special_tokens=False)
        try:
            ids = encoded["input_ids"]
        except (KeyError, TypeError) as error:
            raise TypeError(
                f"tokenizer: got {type(encoded).__name__} without 'input_ids' for {text!r}, expected what "
                "transformers' tokenizers return"
            ) from error
        return self._checked([int(i) for i in ids], text)

    def class_sequence(self, name: str, slots: int = 0, after: Sequence[int] = (), position: str = "end") -> list[int]:
        """``[SOS][slots][after][name . EOT]``, or with the name in the middle or at the front of the slots.

        Args:
            name: The class name; its text is the name and a full stop.
            slots: Learned context tokens M.
            after: Ids of frozen words behind the slots.
            position: Where the name stands: ``"end"``; ``"middle"``: behind the first ``M // 2`` slots; ``"front"``.

        Raises:
            ValueError: the name gives no token, or the sequence is too long.
        """
        own = len(self.ids(name))
        if not own:
            raise ValueError(f"classnames: got {name!r}, which the tokenizer turns into no token; expected a word")
        whole = self.ids(name + ".")
        context = [*range(-1, -1 - slots, -1)]
        first = {"end": slots, "middle": slots // 2, "front": 0}[position]
        inner = [*context[:first], *whole[:own], *context[first:], *whole[own:]]
        if position == "end":
            inner = [*context, *after, *whole]
        return self._closed(inner, name, f" with {slots} context tokens" if slots else "")

    def template_sequence(self, name: str, template: str) -> list[int]:
        """``[SOS][template with the name][EOT]``."""
        inner = self.ids(template.format(name))
        if not inner or not self.ids(name):
            raise ValueError(f"classnames: got {name!r}, which the tokenizer turns into no token; expected a word")
        return self._closed(inner, name, f" in the template {template!r}")

    def _closed(self, inner: list[int], name: str, where: str) -> list[int]:
        sequence = [*self.start, *inner, self.end]
        if len(sequence) > self.limit:
            raise ValueError(
                f"classnames: got {name!r}, which needs {len(sequence)} tokens{where}, expected at most {self.limit}, "
                "the model's context; shorten the name or use fewer context tokens"
            )
        return sequence if self.causal else sequence + [self.pad] * (self.limit - len(sequence))


def check_classnames(classnames: object) -> tuple[str, ...]:
    """Class names as a tuple.

    Raises:
        TypeError: not a sequence of strings.
        ValueError: empty, or a name without text.
    """
    if isinstance(classnames, str) or not isinstance(classnames, Sequence):
        raise TypeError(f"classnames: got {type(classnames).__name__}, expected a sequence of strings")
    if not classnames:
        raise ValueError("classnames: got an empty sequence, expected at least one name")
    for i, name in enumerate(classnames):
        if not isinstance(name, str):
            raise TypeError(f"classnames[{i}]: got {type(name).__name__}, expected a string")
        if not name.strip():
            raise ValueError(f"classnames[{i}]: got {name!r}, expected a name with at least one letter")
    return tuple(classnames)
