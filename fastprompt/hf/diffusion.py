# SPDX-License-Identifier: Apache-2.0
"""Where prompts that are read after attention meet the model: its attention's input and its output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastprompt.hf.attention import CHILD
from fastprompt.nn.diffused import DiffusedPrompt

if TYPE_CHECKING:
    from fastprompt.hf.sites import Site


def install_diffused(sites: list[Site]) -> list:
    """Put the hooks of such prompts on every layer that has one; returns their handles."""
    hooks: list = []
    for site in sites:
        child = getattr(site.attention, CHILD, None)
        if isinstance(child, DiffusedPrompt) and site.output is not None:
            hooks.append(site.attention.register_forward_pre_hook(child.enter, with_kwargs=True))
            hooks.append(site.output.register_forward_hook(child.leave))
    return hooks
