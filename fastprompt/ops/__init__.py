# SPDX-License-Identifier: Apache-2.0
"""Attention with prompts and beside them, compression of its keys, token summaries: one file each, needing torch."""

from fastprompt.ops.compress_kv import compress_kv
from fastprompt.ops.decoupled_attention import decoupled_attention
from fastprompt.ops.diffuse_prompts import diffuse_prompts
from fastprompt.ops.key_scores import key_scores
from fastprompt.ops.merge_states import merge_states
from fastprompt.ops.prompt_attention import prompt_attention
from fastprompt.ops.prompt_attention_varlen import prompt_attention_varlen
from fastprompt.ops.summarize_tokens import summarize_tokens

__all__ = [
    "compress_kv", "decoupled_attention", "diffuse_prompts", "key_scores", "merge_states", "prompt_attention",
    "prompt_attention_varlen", "summarize_tokens",
]  # fmt: skip
