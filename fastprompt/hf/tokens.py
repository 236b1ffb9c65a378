# SPDX-License-Identifier: Apache-2.0
"""Prompt rows that run as tokens: inserted before a layer, replaced or stripped when the next fresh prompt comes.

Deep prompts that the next layer replaces matter only as keys and values (identity I2) and never become rows. Rows are
needed where nothing replaces them in the next layer: shallow prompts, and the last layer of a partial depth.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastprompt.hf.attention import CHILD
from fastprompt.hf.sites import Site, Tower
from fastprompt.nn.prompts import CarriedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Rows(NamedTuple):
    """What happens to prompt rows at one layer; methods are hooks, so a copied model keeps working."""

    stripped: int
    child: Any
    present: int
    mask_at: int | None

    def before(self, layer: nn.Module, args: tuple, kwargs: dict):
        """Strip the rows that a fresh prompt replaces, insert that prompt in front, and let a mask show the rows."""
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden[:, self.stripped :]
        if self.child is not None:
            hidden = _insert(self.child.rows(), hidden)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        if self.present and kwargs.get("attention_mask") is not None:
            kwargs = {**kwargs, "attention_mask": _widen(kwargs["attention_mask"], self.present)}
        elif self.present and self.mask_at is not None and self.mask_at < len(args):
            args = (*args[: self.mask_at], _widen(args[self.mask_at], self.present), *args[self.mask_at + 1 :])
        return args, kwargs

    def after(self, layer: nn.Module, args: tuple, output):
        """Strip the rows behind the last layer: they never reach the final norm or the pooling."""
        if isinstance(output, tuple):
            return (output[0][:, self.present :], *output[1:])
        return output[:, self.present :]


def _insert(rows: Tensor, hidden: Tensor) -> Tensor:
    """``[P,C]`` in front of every sample of ``[B,T,C]``. Order among keys is free; in front, rows count as prefix
    tokens, which rotary vision towers leave unrotated.
    """
    return torch.cat([rows.to(hidden.dtype).expand(len(hidden), -1, -1), hidden], dim=1)


def _widen(mask: Tensor | None, rows: int) -> Tensor | None:
    """A mask ``[B,H,Tq,Tk]`` with ``rows`` prompts in front, which all see and which see what the first token sees."""
    if mask is None:
        return None
    mask = pad(mask, (rows, 0), value=mask.dtype == torch.bool)
    if mask.shape[2] == 1:
        return mask
    return torch.cat([mask[:, :, :1].expand(-1, -1, rows, -1), mask], dim=2)


def reach_checkpointed(tower: Tower) -> list:
    """A hook for reentrant gradient checkpointing, which gives what a layer holds gradients only if its input has one.

    The tower's embeddings get one then, as transformers' `enable_input_require_grads` does for adapters.
    """
    try:
        embeddings = cast("PreTrainedModel", tower.module).get_input_embeddings()
    except NotImplementedError:
        return []
    if embeddings is None:  # a Q-Former reads what another module embedded
        return []
    return [embeddings.register_forward_hook(_Checkpointed(tower.layers[0]).embedded)]


class _Checkpointed(NamedTuple):
    """The first layer, asked whether it is checkpointed; a method is a hook that copies and pickles with the model."""

    layer: Any

    def embedded(self, embeddings: nn.Module, args: tuple, output: Tensor) -> None:
        """Start gradients at the embeddings where reentrant checkpointing needs them."""
        function = getattr(self.layer, "_gradient_checkpointing_func", None)
        on = self.layer.training and getattr(self.layer, "gradient_checkpointing", False) and torch.is_grad_enabled()
        if on and getattr(function, "keywords", {}).get("use_reentrant") and not output.requires_grad:
            output.requires_grad_()


def _mask_position(layer: nn.Module) -> int | None:
    """Where the mask stands among the positional arguments of a layer."""
    names = list(inspect.signature(layer.forward).parameters)
    return names.index("attention_mask") if "attention_mask" in names else None


def install_rows(sites: list[Site]) -> list:
    """Put the hooks on every layer where prompt rows appear, run, or end; returns their handles."""
    hooks = []
    carried = 0
    for site in sites:
        child: Any = getattr(site.attention, CHILD, None)
        child = None if isinstance(child, CarriedPrompt) else child
        stripped = carried if child is not None else 0
        fresh = child if child is not None and child.inserted else None
        if child is not None:
            carried = child.length if child.inserted else 0
        rows = _Rows(stripped, fresh, carried, _mask_position(site.layer))
        if stripped or carried:
            hooks.append(site.layer.register_forward_pre_hook(rows.before, with_kwargs=True))
        if carried and site is sites[-1]:
            hooks.append(site.layer.register_forward_hook(rows.after, prepend=True))
    return hooks
