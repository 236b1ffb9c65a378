# SPDX-License-Identifier: Apache-2.0
"""The context that CLIP recipes start from: the embeddings of given words, or small random vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastprompt.nn.dual_prompt import normal_prompt
from fastprompt.recipes.layers import is_count

if TYPE_CHECKING:
    from fastprompt.hf.clip import ClipSites


def check_context(n_ctx: object, init: object, *, counted: bool = False) -> None:
    """Raise unless ``n_ctx`` is a count, or None unless ``counted``, and ``init`` words or None."""
    if not is_count(n_ctx) and (counted or n_ctx is not None):
        raise ValueError(f"n_ctx: got {n_ctx!r}, expected an integer >= 1")
    if init is not None and (not isinstance(init, str) or not init.strip()):
        raise ValueError(f"init: got {init!r}, expected words such as 'a photo of a', or None for a random start")


def check_depth(depth: object) -> None:
    """Raise unless ``depth`` is a count."""
    if not is_count(depth):
        raise ValueError(f"depth: got {depth!r}, expected an integer >= 1: layers, from the first, that get prompts")


def initial_context(sites: ClipSites, n_ctx: int | None, init: str | None, *, words_may_remain: bool = False) -> Tensor:
    """The context ``[M,W]`` at the start: float32, or float64 for a float64 model.

    Args:
        sites: The CLIP.
        n_ctx: Tokens M; None is as many as ``init`` has.
        init: Words whose embeddings start it; None draws N(0, 0.02²).
        words_may_remain: ``init`` may have more tokens than M.

    Raises:
        ValueError: ``init`` does not have M tokens.
    """
    if init is None:
        return normal_prompt(n_ctx or 16, sites.text_width).to(sites.dtype)
    words = sites.embed(init)
    found, wanted = len(words), n_ctx or len(words)
    if not found:
        raise ValueError(f"init: got {init!r}, which the tokenizer turns into no token; expected words, or None")
    if found < wanted or (found > wanted and not words_may_remain):
        least = "at least " if words_may_remain else ""
        raise ValueError(
            f"n_ctx: got {n_ctx}, but init={init!r} has {found} tokens, expected {least}as many; leave n_ctx out or "
            "init=None"
        )
    return words[:wanted].to(sites.dtype)
