# SPDX-License-Identifier: Apache-2.0
"""Attention with prompts: one file an operation; schemas and fakes are registered on import, with torch alone."""

from fastprompt.ops.merge_states import merge_states
from fastprompt.ops.prompt_attention import prompt_attention
from fastprompt.ops.prompt_attention_varlen import prompt_attention_varlen

__all__ = ["merge_states", "prompt_attention", "prompt_attention_varlen"]
