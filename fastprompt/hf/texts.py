# SPDX-License-Identifier: Apache-2.0
"""A causal language model as a text classifier: the token that follows a prompt names the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastprompt.data.texts import TextSample

SLOT = "{text}"


@dataclass
class Scored:
    """Mean loss and the logits ``[B, C]`` of the classes."""

    loss: Tensor
    logits: Tensor


class EncodedTexts(Dataset[dict[str, Tensor]]):
    """Prompts as token ids, padded on the left, short ones first.

    Args:
        input_ids: int64 ``[N, T]``.
        attention_mask: int64 ``[N, T]``, 0 for padding.
        labels: int64 ``[N]``.
        cut: texts that were longer than allowed.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, cut: int) -> None:
        self.input_ids, self.attention_mask, self.labels, self.cut = input_ids, attention_mask, labels, cut

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids[index],
            "attention_mask": self.attention_mask[index],
            "labels": self.labels[index],
        }


class LabelScorer(nn.Module):
    """Scores each class by the probability that its word follows a prompt.

    A prompt is the template with the text in it; class c has the first token w_c of its word. The loss is that of the
    language model on the label alone, ``-mean log p(w_y | prompt)`` over the whole vocabulary, as prefix tuning trains
    (Li & Liang, 2021, https://arxiv.org/abs/2101.00190); the logits are those of ``w_1 .. w_C`` alone, so that the
    highest one is the class. Only the last position's logits are computed.

    Args:
        lm: a causal language model.
        tokenizer: its tokenizer.
        template: holds ``{text}`` once and does not end in a space.
        words: one a class, each with a first token of its own.

    Raises:
        ValueError: a template or words that cannot be scored so.

    Example:
        >>> from types import SimpleNamespace
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        ...                      intermediate_size=64)
        >>> letters = lambda text, **kwargs: SimpleNamespace(input_ids=list(text.replace(" ", "").encode()))
        >>> scorer = LabelScorer(LlamaForCausalLM(config), letters, "{text}:", ["good", "bad"])
        >>> bytes(scorer.label_ids.tolist())
        b'gb'
    """

    label_ids: Tensor

    def __init__(
        self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str, words: Sequence[str]
    ) -> None:
        super().__init__()
        if template.count(SLOT) != 1:
            raise ValueError(f"template: got {template!r}, expected a text that holds {SLOT!r} once")
        self.lm, self.tokenizer, self.template, self.words = lm, tokenizer, template, tuple(words)
        ids = [self._first_token(word) for word in self.words]
        unknown = getattr(tokenizer, "unk_token_id", None)
        for word, token in zip(self.words, ids, strict=True):
            if token == unknown:
                raise ValueError(
                    f"words: got {word!r}, which the tokenizer does not know; name its class by another word "
                    "(--words CLASS=WORD)"
                )
        for i, word in enumerate(self.words):
            if ids[i] in ids[:i]:
                other = self.words[ids.index(ids[i])]
                raise ValueError(
                    f"words: {other!r} and {word!r} begin with the same token, expected words that differ in the first "
                    "token, which is the one scored; name the classes by other words (--words CLASS=WORD)"
                )
        self.register_buffer("label_ids", torch.tensor(ids, device=lm.device), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Scored:
        """Loss and class logits of prompts ``[B, T]`` that are padded on the left."""
        # An index, not a count: torch multiplies a strided slice with a frozen head by copying the head for every row.
        last = torch.tensor([-1], device=input_ids.device)
        logits = self.lm(**self.compact(input_ids, attention_mask), logits_to_keep=last).logits[:, -1].float()
        loss = nn.functional.cross_entropy(logits, self.label_ids[labels])
        return Scored(loss, logits[:, self.label_ids])

    def compact(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Arguments of the language model, without the columns that are padding in every row of the batch."""
        start = int(attention_mask.any(0).int().argmax())
        ids, mask = input_ids[:, start:], attention_mask[:, start:]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}

    def encode(self, samples: Sequence[TextSample], max_tokens: int) -> EncodedTexts:
        """Put texts into the template, each cut to ``max_tokens`` tokens, and pad them on the left.

        Raises:
            ValueError: ``max_tokens`` is below 1.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens: got {max_tokens}, expected at least 1")
        rows, cut = [], 0
        for text, label in samples:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            if len(ids) > max_tokens:
                text, cut = str(self.tokenizer.decode(ids[:max_tokens])), cut + 1
            rows.append((self.tokenizer(self.template.replace(SLOT, text)).input_ids, label))
        # Neighbours of like length need little padding where a set is read in order.
        rows.sort(key=lambda row: len(row[0]))
        width = len(rows[-1][0]) if rows else 0
        input_ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
        for i, (ids, _) in enumerate(rows):
            input_ids[i, width - len(ids) :] = torch.tensor(ids)
            mask[i, width - len(ids) :] = 1
        return EncodedTexts(input_ids, mask, torch.tensor([label for _, label in rows]), cut)

    def _first_token(self, word: str) -> int:
        """The first token of a word where the template ends."""
        prompt = self.template.replace(SLOT, "x")
        before, after = (self.tokenizer(text).input_ids for text in (prompt, f"{prompt} {word}"))
        if len(after) <= len(before) or after[: len(before)] != before:
            raise ValueError(
                f"template: after {self.template!r} the word {word!r} is no token of its own (the tokenizer joins it "
                "with the template's end, or adds an end token); expected a template that ends in a letter or "
                "punctuation, without a space, such as '{text}\\nLabel:'"
            )
        return after[len(before)]
