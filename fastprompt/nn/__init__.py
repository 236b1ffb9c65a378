# SPDX-License-Identifier: Apache-2.0
"""Modules that hold prompt parameters."""

from fastprompt.nn.prompt_attention import PromptAttention

__all__ = ["PromptAttention"]
