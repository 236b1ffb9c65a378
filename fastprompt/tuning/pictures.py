# SPDX-License-Identifier: Apache-2.0
"""What compressing a cache costs a multimodal model: questions about pictures that stand in the compressed prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt.cache import Policy
from fastprompt.data.openmoji import draw
from fastprompt.data.pictures import PictureQuestions, question_text
from fastprompt.hf.cache import PromptCache


class PictureAnswers(NamedTuple):
    """What a model answered, and what its cache held.

    Attributes:
        right: Bool ``[B,pictures]``, in the order of the questions.
        kept: Share of the prompt's keys that was left, the mean over layers; 1.0 for a plain cache.
    """

    right: Tensor
    kept: float


@torch.no_grad()
def answer_pictures(
    model: Any, processor: Any, tasks: Sequence[PictureQuestions], policy: Policy | None = None
) -> PictureAnswers:
    """Ask for every picture of contexts that were read together; each context has one cache for all its questions.

    The cache is compressed behind the pictures, before any question is known. Each ``Picture k:`` and the token that
    the model answered go on in it; an answer is right where that token is the kind's.

    Args:
        model: As ``load_tiny_llava`` returns it.
        processor: Likewise.
        tasks: Contexts, of one number of pictures.
        policy: None leaves the cache as it is.

    Raises:
        ValueError: the contexts have different numbers of pictures, or a kind is not one token.
    """
    if len({len(task.files) for task in tasks}) != 1:
        raise ValueError(f"tasks: got contexts of {[len(task.files) for task in tasks]} pictures, expected one number")
    images = [draw(file, size=processor.image_size) for task in tasks for file in task.files]
    inputs = processor([task.text for task in tasks], images).to(model.device)
    cache = None if policy is None else PromptCache(model, policy)
    try:
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        kept = 1.0
        if cache is not None:
            cache.finalize()
            kept = sum(layer.kept / layer.seen for layer in cache.stats()) / len(cache.stats())
        right, before = [], None
        for nth in range(len(tasks[0].files)):
            places = [task.order[nth] for task in tasks]
            ids = torch.tensor([processor.ids(question_text(place)) for place in places], device=model.device)
            if before is not None:
                ids = torch.cat([before, ids], dim=1)
            output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            answer = output.logits[:, -1].argmax(dim=-1)
            wanted = [kind_token(processor, task.answers[place]) for task, place in zip(tasks, places, strict=True)]
            right.append(answer.cpu() == torch.tensor(wanted))
            before = torch.stack([answer, torch.full_like(answer, processor.ids("\n")[0])], dim=1)
    finally:
        if cache is not None:
            cache.close()
    return PictureAnswers(torch.stack(right, dim=1), kept)


def kind_token(processor: Any, kind: str) -> int:
    """The one token of a kind, with the space before it.

    Raises:
        ValueError: it has more.
    """
    ids = processor.ids(f" {kind}")
    if len(ids) != 1:
        raise ValueError(f"kind: got {kind!r}, which is {len(ids)} tokens, expected a word of one token")
    return ids[0]
