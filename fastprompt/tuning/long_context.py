# SPDX-License-Identifier: Apache-2.0
"""What compressing a cache costs: whether a number is found again in a long text, and the loss of real text."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastprompt.cache import Policy
from fastprompt.data.long_texts import Passkey
from fastprompt.hf.cache import PromptCache
from fastprompt.hf.compress import compress


@torch.no_grad()
def recalls(model: Any, tokenizer: Any, task: Passkey, policy: Policy | None = None) -> bool:
    """Whether greedy decoding answers with the number; ``policy`` compresses the cache after the prompt.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        task: The prompt and the number.
        policy: None leaves the cache as it is.
    """
    inputs = tokenizer(task.text, return_tensors="pt").to(model.device)
    # The number, a space before it and, where a model repeats itself, one more.
    new = len(tokenizer(task.key, add_special_tokens=False).input_ids) + 2
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with nullcontext() if policy is None else compress(model, policy):
        found = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=pad)
    return task.key in tokenizer.decode(found[0, inputs.input_ids.shape[1] :])


@torch.no_grad()
def continuation_loss(model: Any, ids: Tensor, context: int, policy: Policy | None = None) -> float:
    """Mean negative log-likelihood (nats a token) of what follows ``context`` tokens, which are read from their cache.

    Args:
        model: A causal language model.
        ids: Tokens ``[B,T]``, ``T > context``.
        context: Tokens of the prompt, exact; the others are predicted with their own keys all kept.
        policy: None leaves the cache as it is.
    """
    if not 0 < context < ids.shape[1]:
        raise ValueError(
            f"context: got {context} of {ids.shape[1]} tokens, expected at least 1 and some left to predict"
        )
    cache = None if policy is None else PromptCache(model, policy)
    prompt = model(input_ids=ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1)
    if cache is not None:
        cache.finalize()
    rest = model(input_ids=ids[:, context:-1], past_key_values=prompt.past_key_values, use_cache=True)
    logits = torch.cat([prompt.logits[:, -1:], rest.logits], dim=1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits.flatten(0, 1), ids[:, context:].flatten()).item()
