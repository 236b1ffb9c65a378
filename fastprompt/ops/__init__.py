# SPDX-License-Identifier: Apache-2.0
"""Attention with prompts: one file an operation."""
