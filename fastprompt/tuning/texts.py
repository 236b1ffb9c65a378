# SPDX-License-Identifier: Apache-2.0
"""A few-shot text classification task by names: what ``fastprompt tune --task text`` and ``eval`` run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from fastprompt.data.texts import Texts, few_shot_texts, read_texts, sms_spam

if TYPE_CHECKING:
    from fastprompt.hf.texts import EncodedTexts, LabelScorer

#: Template and words where none are given: for the built-in data, and for files.
TEMPLATES = {"sms-spam": "SMS: {text}\nThis SMS is"}
WORDS = {"sms-spam": {"ham": "normal"}}
TEMPLATE = "{text}\nLabel:"


@dataclass(frozen=True)
class TextTask:
    r"""Texts, a split of them, and the frozen language model that reads them.

    Args:
        model: ``"smollm2-135m"`` (an asset), or a local folder that ``from_pretrained`` reads.
        data: ``"sms-spam"`` (an asset), or a ``.csv`` or ``.jsonl`` file with text and label.
        shots: Training texts a class.
        eval_size: Evaluation texts, balanced over classes; None is half of the smallest class, of each.
        part: ``"test"``, or ``"validation"`` to choose settings without a look at the test texts.
        template: What the model reads, with ``{text}``; None is the data's own, or ``"{text}\nLabel:"``.
        words: The word that names a class, where it is not the class name itself.
        max_tokens: Tokens of a text; longer ones are cut.
        seed: Draws the split, and the initial prompts.
        cache_dir: Where assets are; None is the default cache.
    """

    model: str = "smollm2-135m"
    data: str = "sms-spam"
    shots: int = 16
    eval_size: int | None = None
    part: Literal["test", "validation"] = "test"
    template: str | None = None
    words: dict[str, str] = field(default_factory=dict)
    max_tokens: int = 64
    seed: int = 0
    cache_dir: str | None = None

    def texts(self) -> Texts:
        """The labelled texts."""
        return sms_spam(cache_dir=self.cache_dir) if self.data == "sms-spam" else read_texts(self.data)

    def label_words(self, classes: tuple[str, ...]) -> list[str]:
        """The word of every class.

        Raises:
            ValueError: a word for a class that is not there.
        """
        words = WORDS.get(self.data, {}) | self.words
        unknown = sorted(words.keys() - set(classes))
        if unknown:
            raise ValueError(f"words: got a word for {', '.join(unknown)}, expected classes {', '.join(classes)}")
        return [words.get(name, name) for name in classes]

    def build_model(self, classes: tuple[str, ...], dtype: torch.dtype = torch.float32) -> LabelScorer:
        """The language model, which scores the words of ``classes``."""
        from fastprompt.hf.language_models import load_language_model
        from fastprompt.hf.texts import LabelScorer

        template = self.template or TEMPLATES.get(self.data, TEMPLATE)
        words = self.label_words(classes)
        lm, tokenizer = load_language_model(self.model, dtype=dtype, cache_dir=self.cache_dir)
        return LabelScorer(lm, tokenizer, template, words)

    def split(self, scorer: LabelScorer) -> tuple[EncodedTexts, EncodedTexts]:
        """Training and evaluation texts as token ids."""
        train, evaluation = few_shot_texts(self.texts(), self.shots, self.seed, self.eval_size, self.part)
        return scorer.encode(train, self.max_tokens), scorer.encode(evaluation, self.max_tokens)
