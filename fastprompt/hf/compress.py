# SPDX-License-Identifier: Apache-2.0
"""`compress`: every prompt that a model reads inside a context gets a compressing cache."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from fastprompt.cache import Policy
from fastprompt.errors import AttachError
from fastprompt.hf.cache import PromptCache, check_policy
from fastprompt.hf.switch import engage


@contextmanager
def compress(model: PreTrainedModel, policy: Policy) -> Iterator[None]:
    """Compress the KV cache of a model inside a ``with`` block: ``generate`` and plain forwards, any decoding strategy.

    The empty cache that ``generate`` makes (or none) is replaced by a `PromptCache`, which outputs carry on as
    ``past_key_values``. The prompt ends before the first forward of one token: of a prompt that is read in chunks, a
    last chunk of one token counts as generated. At the end the model is as before, and those caches are closed; to
    keep one, make it yourself.

    Args:
        model: Any transformers decoder or multimodal model, with or without attached prompts.
        policy: What to keep, e.g. ``fastprompt.LookM(recent=0.1, important=0.1, merge="pivot")``.

    Raises:
        AttachError: the model compresses already.
        UnsupportedModelError: the model has no decoder with a cache, or no full-attention layer.
        ValueError: the policy ranks text before images, and the model's config names no image token; inside the block:
            caching is off, or another cache was asked for.

    Example:
        >>> import torch, fastprompt
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                                      num_key_value_heads=2, intermediate_size=64, vocab_size=50))
        >>> with fastprompt.compress(model, fastprompt.SnapKV(keep=0.25, window=8)):
        ...     model.generate(torch.arange(3, 43)[None], max_new_tokens=5, eos_token_id=None).shape
        torch.Size([1, 45])
    """
    check_policy(model, policy)
    switch = engage(model)
    made: weakref.WeakSet[PromptCache] = weakref.WeakSet()

    def make(given: Mapping[str, Any]) -> PromptCache:
        _check_replaceable(model, given)
        cache = PromptCache(model, policy)
        made.add(cache)
        return cache

    try:
        if switch.make is not None:
            raise AttachError("model: got a second compress() on it, expected one; leave the first block before")
        switch.make = make
        try:
            yield
        finally:
            switch.make = None
            for cache in list(made):
                cache.close()
    finally:
        switch.release()


def _check_replaceable(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """A compressing cache can take the place of none, or of the empty one that ``generate`` made."""
    cache, use = given.get("past_key_values"), given.get("use_cache")
    if use is None:
        use = getattr(model.config.get_text_config(decoder=True), "use_cache", True)
    if not use and cache is None:
        raise ValueError("use_cache: got False, expected True: there is no cache to compress without one")
    if cache is None:
        return
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        raise ValueError(
            f"past_key_values: got a {type(cache).__name__}, expected none: compress() makes its own cache; leave out "
            "cache_implementation (a static, offloaded or quantised cache cannot be compressed)"
        )
    if getattr(cache, "_is_user_defined", False) or cache.get_seq_length():
        raise ValueError(
            "past_key_values: got a plain cache of your own, expected none, or a fastprompt.PromptCache: compress() "
            "cannot compress what a plain cache holds"
        )
