# SPDX-License-Identifier: Apache-2.0
"""fastprompt: exact prompts for frozen transformers, without the wasted work."""

__version__ = "0.1.0"
