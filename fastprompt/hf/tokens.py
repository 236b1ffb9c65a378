# SPDX-License-Identifier: Apache-2.0
"""Prompt rows that run as tokens: inserted before a layer, replaced or stripped when the next fresh prompt comes.

Deep prompts that the next layer replaces matter only as keys and values (identity I2) and never become rows. Rows are
needed where nothing replaces them in the next layer: shallow prompts, and the last layer of a partial depth.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprompt.hf.attention import CHILD
from fastprompt.hf.sites import Site, Tower


class _Rows(NamedTuple):
    """What happens to prompt rows at one layer; methods are hooks, so a copied model keeps working."""

    length: int
    child: nn.Module | None
    strip_before: bool
    strip_after: bool
    mask_at: int | None

    def before(self, layer: nn.Module, args: tuple, kwargs: dict):
        """Strip the rows that a fresh prompt replaces, then insert that prompt in front."""
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("attention_mask")
        if mask is None and self.mask_at is not None and self.mask_at < len(args):
            mask = args[self.mask_at]
        if mask is not None:
            raise ValueError(
                "attention_mask: got a mask at a layer where prompts run as tokens, expected None; use deep prompts "
                "in every layer (VPT(depth='deep')), which need no rows"
            )
        if self.strip_before:
            hidden = hidden[:, self.length :]
        if self.child is not None:
            hidden = _insert(self.child.rows(), hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def after(self, layer: nn.Module, args: tuple, output):
        """Strip the rows behind the last layer: they never reach the final norm or the pooling."""
        if isinstance(output, tuple):
            return (output[0][:, self.length :], *output[1:])
        return output[:, self.length :]


def _insert(rows: Tensor, hidden: Tensor) -> Tensor:
    """``[P,C]`` in front of every sample of ``[B,T,C]``. Order among keys is free; in front, rows count as prefix
    tokens, which rotary vision towers leave unrotated.
    """
    return torch.cat([rows.to(hidden.dtype).expand(len(hidden), -1, -1), hidden], dim=1)


def reach_checkpointed(tower: Tower) -> list:
    """A hook for reentrant gradient checkpointing, which gives what a layer holds gradients only if its input has one.

    The tower's embeddings get one then, as transformers' `enable_input_require_grads` does for adapters.
    """
    layer = tower.layers[0]

    def hook(embeddings: nn.Module, args: tuple, output: Tensor):
        function = getattr(layer, "_gradient_checkpointing_func", None)
        on = layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled()
        if on and getattr(function, "keywords", {}).get("use_reentrant") and not output.requires_grad:
            output.requires_grad_()

    try:
        embeddings = tower.module.get_input_embeddings()
    except NotImplementedError:
        return []
    return [embeddings.register_forward_hook(hook)]


def _mask_position(layer: nn.Module) -> int | None:
    """Where the mask stands among the positional arguments of a layer."""
    names = list(inspect.signature(layer.forward).parameters)
    return names.index("attention_mask") if "attention_mask" in names else None


def install_rows(sites: list[Site]) -> list:
    """Put the hooks on every layer whose prompt rows appear, end, or are replaced; returns their handles."""
    hooks = []
    carried = 0
    for site in sites:
        child = getattr(site.attention, CHILD, None)
        fresh = child if child is not None and child.inserted else None
        last = site is sites[-1]
        strip_before = bool(carried) and child is not None
        length = carried
        if child is not None:
            carried = child.prompt.shape[0] if child.inserted else 0
        rows = _Rows(length, fresh, strip_before, last and carried > 0, _mask_position(site.layer))
        if strip_before or fresh is not None:
            hooks.append(site.layer.register_forward_pre_hook(rows.before, with_kwargs=True))
        if rows.strip_after:
            hooks.append(site.layer.register_forward_hook(rows._replace(length=carried).after))
    return hooks
